//! Models split over several GGUF files, as `llama-gguf-split` makes them: `x-00001-of-00003.gguf` and so on, each
//! with `split.no` (from 0), `split.count` and `split.tensors.count` (over all parts); the first has the model's
//! metadata. Knows names and counts; nothing of what the parts hold.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::format::gguf::{GgufError, Value};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// What one part says of the split.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Split {
    /// From 0.
    number: u64,
    count: u64,
    /// In all parts together.
    tensors: Option<u64>,
}

/// Takes the split's keys out of a part's metadata; `None` where the file is a whole model.
pub(super) fn take(metadata: &mut BTreeMap<String, Value>) -> Result<Option<Split>, GgufError> {
    let mut number = |key: &str| match metadata.remove(key) {
        None => Ok(None),
        Some(Value::Unsigned(number)) => Ok(Some(number)),
        Some(Value::Signed(number)) if number >= 0 => Ok(Some(number.unsigned_abs())),
        Some(other) => Err(GgufError::Metadata {
            key: key.to_owned(),
            got: other.describe(),
            expected: "a whole number from 0",
        }),
    };
    let (no, count, tensors) = (number(NUMBER)?, number(COUNT)?, number(TENSORS)?);
    match count {
        None | Some(0 | 1) => Ok(None),
        Some(count) => Ok(Some(Split { number: no.unwrap_or(0), count, tensors })),
    }
}

impl Split {
    /// The files of all parts, in order. `path` is the one this split was read from.
    pub(super) fn parts(&self, path: &Path) -> Result<Vec<PathBuf>, GgufError> {
        let (part, count) = (self.number.saturating_add(1), self.count);
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let stem = name.strip_suffix(&format!("-{part:05}-of-{count:05}.gguf"));
        let stem = stem.ok_or(GgufError::PartName { part, count })?;
        let mut parts = Vec::new();
        for part in 1..=count {
            let name = format!("{stem}-{part:05}-of-{count:05}.gguf");
            let file = path.with_file_name(&name);
            if !file.exists() {
                return Err(GgufError::MissingPart { part, count, name });
            }
            parts.push(file);
        }
        Ok(parts)
    }

    /// Whether the part in place `number` (from 0) belongs there.
    pub(super) fn check_part(&self, number: u64, part: Option<Self>) -> Result<(), GgufError> {
        let part = part.unwrap_or(Self { number: 0, count: 1, tensors: None });
        let equal = |key, got, expected| match got == expected {
            true => Ok(()),
            false => Err(GgufError::PartMismatch { key, got, expected }),
        };
        equal(COUNT, part.count, self.count)?;
        equal(NUMBER, part.number, number)?;
        equal(TENSORS, part.tensors.unwrap_or(0), self.tensors.unwrap_or(0))
    }

    /// Whether the parts hold as many tensors as they should.
    pub(super) fn check_tensors(&self, held: u64) -> Result<(), GgufError> {
        match self.tensors {
            Some(expected) if expected != held => {
                Err(GgufError::PartMismatch { key: TENSORS, got: expected, expected: held })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::gguf::Gguf;
    use crate::format::gguf_writer::GgufWriter;

    /// A model of three parts, part i with the tensor `t{i}`; `change` breaks it.
    fn split(change: impl Fn(usize, &mut GgufWriter)) -> (tempfile::TempDir, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for number in 0..3 {
            let mut file = GgufWriter::default();
            if number == 0 {
                file.text("general.architecture", "llama");
            }
            file.unsigned(NUMBER, number).unsigned(COUNT, 3).unsigned(TENSORS, 3);
            file.floats(&format!("t{number}"), &[2], &[number as f32, 7.0]);
            change(number, &mut file);
            let path = folder.path().join(format!("m-{:05}-of-00003.gguf", number + 1));
            std::fs::write(&path, file.finish()).unwrap();
            paths.push(path);
        }
        (folder, paths)
    }

    fn error(path: &Path) -> String {
        Gguf::open(path).err().expect("must be refused").to_string()
    }

    #[test]
    fn any_part_opens_all_parts() {
        let (_folder, paths) = split(|_, _| ());
        for path in &paths {
            let model = Gguf::open(path).unwrap();
            assert_eq!(model.tensor_names().collect::<Vec<_>>(), ["t0", "t1", "t2"]);
            assert_eq!(model.text("general.architecture").unwrap(), Some("llama"));
            assert!(model.get(COUNT).is_none());
            for number in 0..3 {
                let mut values = [0.0; 2];
                model.tensor(&format!("t{number}")).unwrap().decode_rows(0, &mut values);
                assert_eq!(values, [number as f32, 7.0]);
            }
        }
    }

    #[test]
    fn missing_and_foreign_parts_are_named() {
        let (_folder, paths) = split(|_, _| ());
        let moved = paths[0].with_file_name("other.gguf");
        std::fs::rename(&paths[0], &moved).unwrap();
        assert!(error(&paths[2]).contains("part 1 of 3 is missing: there is no file"));
        assert!(error(&moved).contains("does not end in `-00001-of-00003.gguf`"));
        std::fs::copy(&paths[1], &paths[0]).unwrap();
        let swapped = error(&paths[2]);
        assert!(
            swapped.contains("m-00001-of-00003.gguf") && swapped.contains("`split.no` is 1, but 0"),
            "{swapped}"
        );
    }

    #[test]
    fn wrong_counts_and_tensors_are_named() {
        let refused = |change: fn(usize, &mut GgufWriter), expected: &str| {
            let (_folder, paths) = split(change);
            let error = error(&paths[0]);
            assert!(error.contains(expected), "{error}");
        };
        refused(|n, file| _ = file.unsigned(COUNT, if n == 1 { 4 } else { 3 }), "`split.count` is 4, but 3");
        refused(|n, file| _ = if n == 2 { file.remove(COUNT) } else { file }, "`split.count` is 1, but 3");
        refused(|_, file| _ = file.unsigned(TENSORS, 4), "`split.tensors.count` is 4, but 3");
        refused(|n, file| _ = file.unsigned(TENSORS, 3 + n), "`split.tensors.count` is 4, but 3");
        refused(|_, file| _ = file.floats("same", &[1], &[0.0]), "`same` appears twice");
        refused(|_, file| _ = file.text(NUMBER, "one"), "`split.no` is a text");
        refused(|_, file| _ = file.unsigned(COUNT, usize::MAX), "name does not end in");
    }
}
