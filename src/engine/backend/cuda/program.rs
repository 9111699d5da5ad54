//! The files of `kernels/` and what they become: machine code for one architecture, compiled once and kept under a
//! digest of all it depends on, or the portable PTX that the binary brings along. Knows no device.
//!
//! ```text
//! kernels/x.cu + its headers ─┬─► NVRTC ─► cubin for sm_90, kept in a folder by content
//!                             └─► kernels/portable.ptx, made when a kernel changes: the driver alone suffices
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

use super::nvrtc::{Compiler, NvrtcError, Text, options};

/// What the portable PTX is compiled for: the oldest architecture that computes in bfloat16.
pub(crate) const PORTABLE_ARCHITECTURE: &str = "sm_80";
/// Opens the part of a file in the portable PTX, before the file's name and the digest of its source.
const PART: &str = "// kernels/";
/// Part of the name of every kept file; to be changed with their layout.
const DOMAIN: &str = "tunesmith cubin 1";

macro_rules! files {
    ($suffix:literal: $($name:literal)*) => {
        &[$(($name, include_str!(concat!("../../../../kernels/", $name, $suffix)))),*]
    };
}

/// Names without `.cu`, and contents.
static SOURCES: &[(&str, &str)] = files!(".cu":
    "attention" "attention_backward" "conv" "convert" "entropy" "gemm" "glu" "lora" "nf4" "noise" "norm"
    "optimizer" "rope" "rows" "scan" "scan_chunks" "scan_gradients"
);
/// Names without `.cuh`, and contents.
static HEADERS: &[(&str, &str)] = files!(".cuh":
    "attention" "chunk" "common" "eight" "panel" "scan" "span"
);
static PORTABLE: &str = include_str!("../../../../kernels/portable.ptx");

/// A file of `kernels/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Program {
    /// `rope.cu`
    pub(crate) name: String,
    source: &'static str,
    /// Those it includes, and those that they include.
    headers: Vec<(String, &'static str)>,
}

impl Program {
    /// All files, by name.
    pub(crate) fn all() -> &'static [Self] {
        static ALL: OnceLock<Vec<Program>> = OnceLock::new();
        ALL.get_or_init(|| {
            let program = |&(name, source): &(&str, &'static str)| {
                let mut headers = BTreeMap::new();
                add_headers(source, &mut headers);
                Self { name: format!("{name}.cu"), source, headers: headers.into_iter().collect() }
            };
            SOURCES.iter().map(program).collect()
        })
    }

    /// The file that has the kernel `entry`.
    #[cfg(test)]
    pub(crate) fn of_entry(entry: &str) -> Option<&'static Self> {
        Self::all().iter().find(|program| program.entries().any(|name| name == entry))
    }

    /// Names of its kernels. They are read off the portable PTX, since macros stamp some of them.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &'static str> {
        self.portable().lines().filter_map(|line| {
            let name = line.split_once(".entry ")?.1;
            Some(name.split(['(', ' ']).next().unwrap_or(name))
        })
    }

    /// The PTX for every device since [`PORTABLE_ARCHITECTURE`].
    pub(crate) fn portable(&self) -> &'static str {
        portable_parts().get(self.name.as_str()).copied().unwrap_or_default()
    }

    /// The PTX for `architecture`, as NVRTC emits it: for the interpreter, and for the portable text.
    ///
    /// # Errors
    /// As [`Compiler::ptx`].
    #[cfg(test)]
    pub(crate) fn ptx(
        &self,
        compiler: &Compiler,
        architecture: &str,
        extra: &[&str],
    ) -> Result<String, NvrtcError> {
        compiler.ptx(self.text(&self.header_names()), architecture, extra)
    }

    /// Machine code for `architecture`: that of an earlier time where it was kept, else compiled now.
    ///
    /// # Errors
    /// As [`Compiler::cubin`].
    pub(crate) fn cubin(
        &self,
        compiler: &Compiler,
        architecture: &str,
        kept: &Kept,
    ) -> Result<Vec<u8>, NvrtcError> {
        let key = self.key(compiler, architecture);
        if let Some(code) = kept.get(key) {
            return Ok(code);
        }
        let code = compiler.cubin(self.text(&self.header_names()), architecture, &[])?;
        kept.put(key, &code);
        Ok(code)
    }

    /// Under what its code is kept.
    pub(super) fn key(&self, compiler: &Compiler, architecture: &str) -> blake3::Hash {
        self.digest(&options(architecture, &[]), compiler.identity())
    }

    fn header_names(&self) -> Vec<(&str, &str)> {
        self.headers.iter().map(|(name, text)| (name.as_str(), *text)).collect()
    }

    fn text<'a>(&'a self, headers: &'a [(&'a str, &'a str)]) -> Text<'a> {
        Text { name: &self.name, source: self.source, headers }
    }

    /// The digest of all that decides the code.
    fn digest(&self, options: &[String], compiler: &str) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        add(DOMAIN);
        add(compiler);
        add(self.source);
        self.headers.iter().for_each(|(name, text)| {
            add(name);
            add(text);
        });
        options.iter().for_each(|option| add(option));
        hasher.finalize()
    }
}

/// Adds the headers that `text` includes, and theirs.
fn add_headers(text: &str, headers: &mut BTreeMap<String, &'static str>) {
    let included = text.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
    for file in included {
        let header = HEADERS.iter().find(|(name, _)| file.strip_suffix(".cuh") == Some(*name));
        if let Some((_, text)) = header
            && headers.insert(file.to_owned(), text).is_none()
        {
            add_headers(text, headers);
        }
    }
}

/// The parts of the portable PTX by their files' names.
fn portable_parts() -> &'static BTreeMap<&'static str, &'static str> {
    static PARTS: OnceLock<BTreeMap<&'static str, &'static str>> = OnceLock::new();
    PARTS.get_or_init(|| {
        let part = |part: &'static str| {
            let (head, ptx) = part.split_once('\n')?;
            Some((head.split(' ').next()?, ptx))
        };
        PORTABLE.split(PART).skip(1).filter_map(part).collect()
    })
}

/// A folder of machine code compiled before: each file is named by the digest of what it was made of, and opens with
/// the digest of the code that follows. Without a folder nothing is kept.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept(Option<PathBuf>);

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Says in which folder compiled kernels are kept in this process; the first call counts.
pub fn keep_kernels_in(folder: PathBuf) {
    // A second folder would be no mistake, only a second place to look in.
    let _ = FOLDER.set(folder);
}

impl Kept {
    /// In the folder of [`keep_kernels_in`], else in the person's cache folder.
    pub(crate) fn here() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache =
            || variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
        Self(FOLDER.get().cloned().or_else(|| cache().map(|cache| cache.join("tunesmith/cubins"))))
    }

    #[cfg(test)]
    pub(super) fn at(folder: PathBuf) -> Self {
        Self(Some(folder))
    }

    fn path(&self, key: blake3::Hash) -> Option<PathBuf> {
        self.0.as_ref().map(|folder| folder.join(format!("{key}.cubin")))
    }

    /// The code, if it is there and whole.
    fn get(&self, key: blake3::Hash) -> Option<Vec<u8>> {
        let bytes = fs_err::read(self.path(key)?).ok()?;
        let (digest, code) = bytes.split_first_chunk::<32>()?;
        (blake3::hash(code) == *digest).then(|| code.to_vec())
    }

    /// Keeps code. A folder that cannot be written costs the next process time, nothing else.
    pub(super) fn put(&self, key: blake3::Hash, code: &[u8]) {
        let Some(path) = self.path(key) else { return };
        if let Err(error) = write_whole(&path, &[blake3::hash(code).as_bytes(), code].concat()) {
            tracing::warn!("a compiled kernel cannot be kept: {error}");
        }
    }
}

/// Writes beside `path` and renames: another process sees the whole file or none.
fn write_whole(path: &std::path::Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs_err::create_dir_all(folder)?;
    }
    let thread = format!("{:?}", std::thread::current().id());
    let beside = path.with_extension(format!("{}-{thread}.part", std::process::id()));
    fs_err::write(&beside, bytes)?;
    fs_err::rename(beside, path)
}

#[cfg(test)]
mod tests;
