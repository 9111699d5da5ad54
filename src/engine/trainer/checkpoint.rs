//! Checkpoints of a training run: everything that the next step depends on, in one file that is whole or absent.
//! Knows files and bytes; what the numbers mean, and when to write, is the trainer's. All that a step needs
//! besides (data position, learning rate, random numbers) is a function of the step, so it is not stored.
//!
//! ```text
//! step-00000012.ckpt, little-endian
//!  0   8  magic "TSCKPT\r\n"
//!  8   4  version
//! 12   4  H, length of the header
//! 16   H  header, JSON: identity, step, losses, evals, warnings, parameters P, sections S
//!      4·P·S  f32: adapter, first moments, second moments, and with S = 4 the best adapter
//!     32  BLAKE3 of everything before
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::events::{EvalRecord, StepRecord};

const MAGIC: [u8; 8] = *b"TSCKPT\r\n";
const VERSION: u32 = 1;
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

/// The state of a run after `step` steps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Checkpoint {
    /// Digest of options, rows and base: only a run with the same one may go on from here.
    pub identity: String,
    pub step: usize,
    pub losses: Vec<StepRecord>,
    pub evals: Vec<EvalRecord>,
    pub warnings: Vec<String>,
    /// Adapter values (P), tensors one after another.
    pub adapter: Vec<f32>,
    /// AdamW's moments (P).
    pub first: Vec<f32>,
    pub second: Vec<f32>,
    /// The adapter (P) with the lowest validation loss, where that one is to be kept.
    pub best: Option<Vec<f32>>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    identity: String,
    step: usize,
    losses: Vec<StepRecord>,
    evals: Vec<EvalRecord>,
    warnings: Vec<String>,
    parameters: usize,
    sections: usize,
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
    pub(super) fn write(&self, checkpoint: &Checkpoint) -> std::io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let name = format!("step-{:08}.ckpt", checkpoint.step);
        let temporary = self.dir.join(format!("{name}.tmp"));
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&checkpoint.encode()?)?;
        file.sync_all()?;
        fs::rename(&temporary, self.dir.join(name))?;
        // The rename itself must survive a power cut.
        fs::File::open(&self.dir)?.sync_all()?;
        self.prune()
    }

    /// The newest checkpoint of the run `identity` with `parameters` values, and why newer files were passed over.
    pub(super) fn newest(
        &self,
        identity: &str,
        parameters: usize,
    ) -> std::io::Result<(Option<Checkpoint>, Vec<(PathBuf, Unusable)>)> {
        let mut passed_over = Vec::new();
        for path in self.files()?.into_iter().rev() {
            match Checkpoint::read(&path, identity, parameters) {
                Ok(checkpoint) => return Ok((Some(checkpoint), passed_over)),
                Err(reason) => passed_over.push((path, reason)),
            }
        }
        Ok((None, passed_over))
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

impl Checkpoint {
    fn sections(&self) -> impl Iterator<Item = &Vec<f32>> {
        [&self.adapter, &self.first, &self.second].into_iter().chain(&self.best)
    }

    fn encode(&self) -> std::io::Result<Vec<u8>> {
        let parameters = self.adapter.len();
        assert!(self.sections().all(|section| section.len() == parameters), "BUG: sections differ in length");
        let header = serde_json::to_vec(&Header {
            identity: self.identity.clone(),
            step: self.step,
            losses: self.losses.clone(),
            evals: self.evals.clone(),
            warnings: self.warnings.clone(),
            parameters,
            sections: self.sections().count(),
        })?;
        let header_bytes = u32::try_from(header.len()).map_err(std::io::Error::other)?;
        let mut bytes = Vec::with_capacity(PREFIX_BYTES + header.len() + 16 * parameters + DIGEST_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&header_bytes.to_le_bytes());
        bytes.extend_from_slice(&header);
        for section in self.sections() {
            bytes.extend(section.iter().flat_map(|value| value.to_le_bytes()));
        }
        let digest = blake3::hash(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        Ok(bytes)
    }

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
        if !(3..=4).contains(&header.sections) || values.len() != 4 * parameters * header.sections {
            return Err(Unusable::Damaged);
        }
        let section = |index: usize| -> Vec<f32> {
            let bytes = &values[4 * parameters * index..4 * parameters * (index + 1)];
            bytes
                .chunks_exact(4)
                .map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]]))
                .collect()
        };
        Ok(Self {
            identity: header.identity,
            step: header.step,
            losses: header.losses,
            evals: header.evals,
            warnings: header.warnings,
            adapter: section(0),
            first: section(1),
            second: section(2),
            best: (header.sections == 4).then(|| section(3)),
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
        Checkpoint {
            identity: "run".into(),
            step,
            losses: losses.collect(),
            evals: vec![EvalRecord { step, loss: 2.0f64.sqrt(), train_loss: 3.0f64.sqrt(), seconds: 0.1 }],
            warnings: vec!["a `gap`".into()],
            adapter: vec![1.0, -0.0, f32::MIN_POSITIVE / 2.0],
            first: vec![0.1, 0.2, 0.3],
            second: vec![0.4, 0.5, 0.6],
            best: None,
        }
    }

    fn folder() -> (tempfile::TempDir, CheckpointFolder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = CheckpointFolder { dir: dir.path().join("deep"), every: 1, identity: String::new() };
        (dir, folder)
    }

    #[test]
    fn every_bit_comes_back() {
        let (_dir, folder) = folder();
        let with_best = Checkpoint { best: Some(vec![7.0, 8.0, 9.0]), ..checkpoint(50) };
        for written in [checkpoint(3), with_best] {
            folder.write(&written).unwrap();
            let (read, passed_over) = folder.newest("run", 3).unwrap();
            let read = read.unwrap();
            assert_eq!(read, written);
            assert_eq!(read.adapter[1].to_bits(), (-0.0f32).to_bits());
            assert!(passed_over.is_empty());
        }
    }

    #[test]
    fn random_floats_survive_the_header() {
        let mut random = crate::random::Random::new(&[1]);
        let losses: Vec<StepRecord> = std::iter::repeat_with(|| random.unit() * 10.0)
            .take(2000)
            .map(|loss| StepRecord { loss, ..checkpoint(1).losses[0].clone() })
            .collect();
        let written = Checkpoint { losses, ..checkpoint(1) };
        let read = Checkpoint::decode(&written.encode().unwrap(), "run", 3).unwrap();
        assert_eq!(read.losses, written.losses);
    }

    #[test]
    fn only_the_newest_two_stay() {
        let (_dir, folder) = folder();
        for step in [1, 2, 9, 10] {
            folder.write(&checkpoint(step)).unwrap();
        }
        let names: Vec<_> =
            folder.files().unwrap().iter().map(|path| path.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["step-00000009.ckpt", "step-00000010.ckpt"]);
    }

    #[test]
    fn any_altered_or_missing_byte_is_seen() {
        let bytes = checkpoint(1).encode().unwrap();
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
        folder.write(&checkpoint(4)).unwrap();
        folder.write(&checkpoint(8)).unwrap();
        let newest = folder.dir.join("step-00000008.ckpt");
        let bytes = fs::read(&newest).unwrap();
        fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
        let (read, passed_over) = folder.newest("run", 3).unwrap();
        assert_eq!(read.unwrap().step, 4);
        assert_eq!(passed_over.len(), 1);
        assert!(matches!(passed_over[0].1, Unusable::Damaged));
    }

    #[test]
    fn another_run_s_checkpoint_is_passed_over() {
        let (_dir, folder) = folder();
        folder.write(&checkpoint(4)).unwrap();
        for (identity, parameters) in [("other", 3), ("run", 4)] {
            let (read, passed_over) = folder.newest(identity, parameters).unwrap();
            assert!(read.is_none());
            assert!(matches!(passed_over[0].1, Unusable::Foreign));
        }
    }

    #[test]
    fn unfinished_writes_are_not_seen() {
        let (_dir, folder) = folder();
        folder.write(&checkpoint(4)).unwrap();
        fs::write(folder.dir.join("step-00000005.ckpt.tmp"), b"half").unwrap();
        let (read, passed_over) = folder.newest("run", 3).unwrap();
        assert_eq!((read.unwrap().step, passed_over.len()), (4, 0));
    }
}
