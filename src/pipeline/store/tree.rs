//! The canonical form of a folder's content: one JSON line a file, sorted by path. Its digest names the
//! whole tree, and the bytes themselves can be kept as an object and compared later.

use crate::digest::Digest;
use crate::stage::OutputFile;

/// The bytes that stand for `files`, which must be sorted by path.
pub fn tree_encode(files: &[OutputFile]) -> Vec<u8> {
    debug_assert!(files.is_sorted_by(|a, b| a.path < b.path), "BUG: a tree lists each path once, in order");
    let mut bytes = Vec::with_capacity(files.len() * 128);
    for file in files {
        serde_json::to_writer(&mut bytes, file).expect("texts and numbers always have a JSON form");
        bytes.push(b'\n');
    }
    bytes
}

/// The digest of the tree of `files`, which must be sorted by path.
pub fn tree_digest(files: &[OutputFile]) -> Digest {
    Digest::of(&tree_encode(files))
}

/// The files that `bytes` stand for; `None` if they are no tree.
pub fn tree_decode(bytes: &[u8]) -> Option<Vec<OutputFile>> {
    serde_json::Deserializer::from_slice(bytes).into_iter().collect::<Result<_, _>>().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> OutputFile {
        OutputFile { path: path.to_owned(), digest: Digest::of(path.as_bytes()), bytes: 7 }
    }

    #[test]
    fn trees_round_trip() {
        let files = vec![file("a\n\"b\".md"), file("b/ü.md")];
        assert_eq!(tree_decode(&tree_encode(&files)).unwrap(), files);
        assert_eq!(tree_decode(b"").unwrap(), vec![]);
        assert!(tree_decode(b"{\"path\":").is_none());
    }

    #[test]
    fn every_part_of_a_file_counts() {
        let whole = tree_digest(&[file("a")]);
        for other in [
            OutputFile { bytes: 8, ..file("a") },
            OutputFile { path: "b".to_owned(), ..file("a") },
            OutputFile { digest: Digest::of(b"x"), ..file("a") },
        ] {
            assert_ne!(tree_digest(&[other]), whole);
        }
        assert_ne!(tree_digest(&[]), whole);
    }
}
