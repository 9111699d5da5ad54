//! Checkpoints of a training run: everything that the next step depends on, in one file that is whole or absent.
//! Knows files and bytes; what the numbers mean, and when to write, is the trainer's. All that a step needs
//! besides (data position, learning rate, random numbers) is a function of the step, so it is not stored.
//!
//! ```text
//! step-00000012.ckpt, little-endian
//!  0   8  magic "TSCKPT\r\n"
//!  8   4  version
//! 12   4  H, length of the header
//! 16   H  header, JSON: identity, step, losses, evals, warnings, parameters P, optimizer bytes O, best adapter?
//!    4·P  f32: adapter
//!      O  optimizer state: f32 and 8-bit codes
//!    4·P  f32: the best adapter, if there is one
//!     32  BLAKE3 of everything before
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::events::{EvalRecord, StepRecord};
use crate::optimizer::StatePart;

const MAGIC: [u8; 8] = *b"TSCKPT\r\n";
const VERSION: u32 = 2;
const PREFIX_BYTES: usize = 16;
const DIGEST_BYTES: usize = 32;
/// How many checkpoints stay: the newest, and one to fall back to.
const KEPT: usize = 2;

/// Where checkpoints go and how often.
#[derive(Debug, Clone)]
pub struct CheckpointFolder {
    /// The folder; made if it is missing.
    pub dir: PathBuf,
    /// A checkpoint after every so many steps; 0 for none but the last and on cancel.
    pub every: usize,
    /// What the run depends on besides its options and rows: the digest of the base model, for instance. A
    /// checkpoint of another identity is not used.
    pub identity: String,
}

/// What a checkpoint says before its values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Header {
    /// Digest of options, rows and base: only a run with the same one may go on from here.
    pub(super) identity: String,
    /// Steps done.
    pub(super) step: usize,
    pub(super) losses: Vec<StepRecord>,
    pub(super) evals: Vec<EvalRecord>,
    pub(super) warnings: Vec<String>,
    /// P: values of an adapter.
    pub(super) parameters: usize,
    /// O: bytes of the optimizer's state.
    pub(super) optimizer_bytes: usize,
    /// Whether the best adapter is here.
    pub(super) has_best: bool,
}

impl Header {
    /// Bytes between header and digest.
    fn body_bytes(&self) -> usize {
        4 * self.parameters * (1 + usize::from(self.has_best)) + self.optimizer_bytes
    }
}

/// A checkpoint that was read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Checkpoint {
    pub(super) header: Header,
    pub(super) adapter: Vec<f32>,
    pub(super) optimizer: Vec<u8>,
    pub(super) best: Option<Vec<f32>>,
}

/// What a folder holds for a run.
pub(super) struct Found {
    /// The newest checkpoint of the run.
    pub(super) newest: Option<Checkpoint>,
    /// Newer files, and why each was passed over.
    pub(super) passed_over: Vec<(PathBuf, Unusable)>,
}

/// Why a file is not a checkpoint to go on from.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it cannot be read: {0}")]
    Unreadable(#[from] std::io::Error),
    #[error("it is cut short or altered")]
    Damaged,
    #[error("it is of format {0}, this program writes {VERSION}")]
    Version(u32),
    #[error("it is of a run with other options, rows or base model")]
    Foreign,
}

impl CheckpointFolder {
    /// Writes a checkpoint so that a crash leaves it whole or absent, then removes all but the newest two.
    /// `parts` are adapter, optimizer and best adapter one after another, in any number of slices.
    pub(super) fn write<'a>(
        &self,
        header: &Header,
        parts: impl Iterator<Item = StatePart<'a>>,
    ) -> std::io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let name = format!("step-{:08}.ckpt", header.step);
        let temporary = self.dir.join(format!("{name}.tmp"));
        let mut file = fs::File::create(&temporary)?;
        encode(header, parts, &mut file)?;
        file.sync_all()?;
        fs::rename(&temporary, self.dir.join(name))?;
        // The rename itself must survive a power cut.
        fs::File::open(&self.dir)?.sync_all()?;
        self.prune()
    }

    /// The newest checkpoint of the run `identity` with `parameters` values.
    pub(super) fn newest(&self, identity: &str, parameters: usize) -> std::io::Result<Found> {
        let mut passed_over = Vec::new();
        for path in self.files()?.into_iter().rev() {
            match Checkpoint::read(&path, identity, parameters) {
                Ok(checkpoint) => return Ok(Found { newest: Some(checkpoint), passed_over }),
                Err(reason) => passed_over.push((path, reason)),
            }
        }
        Ok(Found { newest: None, passed_over })
    }

    /// Finished checkpoint files, oldest step first.
    fn files(&self) -> std::io::Result<Vec<PathBuf>> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with("step-") && name.ends_with(".ckpt") {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }

    fn prune(&self) -> std::io::Result<()> {
        let files = self.files()?;
        for old in &files[..files.len().saturating_sub(KEPT)] {
            fs::remove_file(old)?;
        }
        Ok(())
    }
}

/// Writes the whole file to `out`, piece by piece: an adapter may have hundreds of megabytes.
fn encode<'a>(
    header: &Header,
    parts: impl Iterator<Item = StatePart<'a>>,
    out: &mut impl Write,
) -> std::io::Result<()> {
    let text = serde_json::to_vec(header)?;
    let text_bytes = u32::try_from(text.len()).map_err(std::io::Error::other)?;
    let mut digest = blake3::Hasher::new();
    let mut put = |bytes: &[u8]| {
        digest.update(bytes);
        out.write_all(bytes)
    };
    put(&[&MAGIC[..], &VERSION.to_le_bytes(), &text_bytes.to_le_bytes(), &text].concat())?;
    let mut count = 0;
    for part in parts {
        match part {
            StatePart::Codes(codes) => {
                count += codes.len();
                put(codes)?;
            }
            StatePart::Floats(values) => {
                count += 4 * values.len();
                for values in values.chunks(1 << 16) {
                    put(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())?;
                }
            }
        }
    }
    assert_eq!(count, header.body_bytes(), "BUG: a checkpoint lacks values");
    out.write_all(digest.finalize().as_bytes())
}

impl Checkpoint {
    fn read(path: &Path, identity: &str, parameters: usize) -> Result<Self, Unusable> {
        Self::decode(&fs::read(path)?, identity, parameters)
    }

    /// Believes nothing before the digest has been checked.
    fn decode(bytes: &[u8], identity: &str, parameters: usize) -> Result<Self, Unusable> {
        let body_bytes = bytes.len().checked_sub(DIGEST_BYTES).ok_or(Unusable::Damaged)?;
        let (body, digest) = bytes.split_at(body_bytes);
        if body_bytes < PREFIX_BYTES || body[..8] != MAGIC || blake3::hash(body).as_bytes() != digest {
            return Err(Unusable::Damaged);
        }
        let word = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
        if word(8) != VERSION {
            return Err(Unusable::Version(word(8)));
        }
        let (header, values) =
            body[PREFIX_BYTES..].split_at_checked(word(12) as usize).ok_or(Unusable::Damaged)?;
        let header: Header = serde_json::from_slice(header).map_err(|_| Unusable::Damaged)?;
        if header.identity != identity || header.parameters != parameters {
            return Err(Unusable::Foreign);
        }
        if values.len() != header.body_bytes() {
            return Err(Unusable::Damaged);
        }
        let floats = |bytes: &[u8]| -> Vec<f32> {
            let values = bytes.chunks_exact(4);
            values.map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]])).collect()
        };
        let (adapter, rest) = values.split_at(4 * parameters);
        let (optimizer, best) = rest.split_at(header.optimizer_bytes);
        Ok(Self {
            adapter: floats(adapter),
            optimizer: optimizer.to_vec(),
            best: header.has_best.then(|| floats(best)),
            header,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(step: usize) -> Checkpoint {
        let losses = (1..=step).map(|step| StepRecord {
            step,
            epoch: 1,
            // Values whose shortest decimal form is long: all of their bits must come back.
            loss: 0.1 + 0.2 + step as f64 / 7.0,
            learning_rate: 2e-4 / 3.0,
            grad_norm: f64::from(1.0f32 / 3.0),
            tokens: 10,
            supervised_tokens: 3,
            seconds: 1.0 / 9.0,
        });
        let header = Header {
            identity: "run".into(),
            step,
            losses: losses.collect(),
            evals: vec![EvalRecord { step, loss: 2.0f64.sqrt(), train_loss: 3.0f64.sqrt(), seconds: 0.1 }],
            warnings: vec!["a `gap`".into()],
            parameters: 3,
            optimizer_bytes: 5,
            has_best: false,
        };
        let adapter = vec![1.0, -0.0, f32::MIN_POSITIVE / 2.0];
        Checkpoint { header, adapter, optimizer: vec![1, 2, 3, 4, 5], best: None }
    }

    fn parts(checkpoint: &Checkpoint) -> impl Iterator<Item = StatePart<'_>> {
        [StatePart::Floats(&checkpoint.adapter), StatePart::Codes(&checkpoint.optimizer)]
            .into_iter()
            .chain(checkpoint.best.as_deref().map(StatePart::Floats))
    }

    fn write(folder: &CheckpointFolder, checkpoint: &Checkpoint) {
        folder.write(&checkpoint.header, parts(checkpoint)).unwrap();
    }

    fn bytes_of(checkpoint: &Checkpoint) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(&checkpoint.header, parts(checkpoint), &mut bytes).unwrap();
        bytes
    }

    fn folder() -> (tempfile::TempDir, CheckpointFolder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = CheckpointFolder { dir: dir.path().join("deep"), every: 1, identity: String::new() };
        (dir, folder)
    }

    #[test]
    fn every_bit_comes_back() {
        let (_dir, folder) = folder();
        let mut with_best = checkpoint(50);
        with_best.header.has_best = true;
        with_best.best = Some(vec![7.0, 8.0, 9.0]);
        for written in [checkpoint(3), with_best] {
            write(&folder, &written);
            let Found { newest: read, passed_over } = folder.newest("run", 3).unwrap();
            let read = read.unwrap();
            assert_eq!(read, written);
            assert_eq!(read.adapter[1].to_bits(), (-0.0f32).to_bits());
            assert!(passed_over.is_empty());
        }
    }

    #[test]
    fn random_floats_survive_the_header() {
        let mut random = crate::random::Random::new(&[1]);
        let mut written = checkpoint(2000);
        for record in &mut written.header.losses {
            record.loss = random.unit() * 10.0;
        }
        assert_eq!(Checkpoint::decode(&bytes_of(&written), "run", 3).unwrap(), written);
    }

    #[test]
    fn only_the_newest_two_stay() {
        let (_dir, folder) = folder();
        for step in [1, 2, 9, 10] {
            write(&folder, &checkpoint(step));
        }
        let names: Vec<_> =
            folder.files().unwrap().iter().map(|path| path.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["step-00000009.ckpt", "step-00000010.ckpt"]);
    }

    #[test]
    fn any_altered_or_missing_byte_is_seen() {
        let bytes = bytes_of(&checkpoint(1));
        for index in 0..bytes.len() {
            let mut altered = bytes.clone();
            altered[index] ^= 0x40;
            assert!(Checkpoint::decode(&altered, "run", 3).is_err(), "byte {index}");
            assert!(Checkpoint::decode(&bytes[..index], "run", 3).is_err(), "cut at {index}");
        }
    }

    #[test]
    fn torn_newest_falls_back_to_the_one_before() {
        let (_dir, folder) = folder();
        write(&folder, &checkpoint(4));
        write(&folder, &checkpoint(8));
        let newest = folder.dir.join("step-00000008.ckpt");
        let bytes = fs::read(&newest).unwrap();
        fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
        let Found { newest: read, passed_over } = folder.newest("run", 3).unwrap();
        assert_eq!(read.unwrap().header.step, 4);
        assert_eq!(passed_over.len(), 1);
        assert!(matches!(passed_over[0].1, Unusable::Damaged));
    }

    #[test]
    fn another_run_s_checkpoint_is_passed_over() {
        let (_dir, folder) = folder();
        write(&folder, &checkpoint(4));
        for (identity, parameters) in [("other", 3), ("run", 4)] {
            let Found { newest: read, passed_over } = folder.newest(identity, parameters).unwrap();
            assert!(read.is_none());
            assert!(matches!(passed_over[0].1, Unusable::Foreign));
        }
    }

    #[test]
    fn unfinished_writes_are_not_seen() {
        let (_dir, folder) = folder();
        write(&folder, &checkpoint(4));
        fs::write(folder.dir.join("step-00000005.ckpt.tmp"), b"half").unwrap();
        let Found { newest: read, passed_over } = folder.newest("run", 3).unwrap();
        assert_eq!((read.unwrap().header.step, passed_over.len()), (4, 0));
    }
}
