//! A training run as Weights & Biases keeps one offline: `wandb sync` uploads the folder, whenever and if ever the
//! user wants that. Knows the log's frame and the few fields of its messages; nothing of training, no network.
//! The run's name and times come from its content, so that the same run gives the same bytes.
//!
//! ```text
//! wandb/offline-run-19700101_000000-<id>/run-<id>.wandb, files/wandb-summary.json
//! file     ":W&B" | 0xBEE1 u16 | version u8 | blocks of 32 KiB, this head being part of the first
//! record   CRC-32 of kind and data u32 | length u16 | kind u8: 1 whole, 2 first, 3 middle, 4 last | data
//!          where fewer than 7 bytes of a block are left, they are zero
//! Record   1 num | 2 history { 1 item { 2 key, 16 JSON }, 2 step { 1 num } } | 3 summary { 1 update { 1 key, 16 JSON } }
//!          17 run { 1 id, 3 project, 4 config { 1 update { 1 key, 16 JSON } }, 8 name } | 18 exit {}
//!          21 header { 1 version { 1 producer, 2 oldest reader } }
//! ```

use serde_json::{Map, Value, json};

use super::protobuf::{IEEE, Message, crc32};
use super::tensorboard::Scalar;

const BLOCK: usize = 32 << 10;
const HEAD: usize = 7;
/// The oldest wandb whose reader knows these messages.
const OLDEST_READER: &str = "0.12.0";

/// What a run has to say.
pub(super) struct Record<'a> {
    pub(super) project: &'a str,
    pub(super) name: &'a str,
    pub(super) config: &'a Map<String, Value>,
    pub(super) scalars: &'a [Scalar],
    pub(super) summary: &'a Map<String, Value>,
}

/// The files of the run: where each goes below the artifact, and its bytes. The log comes first.
pub(super) fn offline_run(record: &Record<'_>) -> [(String, Vec<u8>); 2] {
    let id = id(record);
    let mut log = Log::new();
    let (mut version, mut header) = (Message::default(), Message::default());
    version.bytes(1, b"tunesmith");
    version.bytes(2, OLDEST_READER.as_bytes());
    header.bytes(1, &version.0);
    log.add(21, &header);
    log.add(17, &run(record, &id));
    for (step, row) in history(record.scalars) {
        let (mut message, mut number) = (Message::default(), Message::default());
        for (key, value) in &row {
            message.bytes(1, &item(2, key, value).0);
        }
        number.varint(1, step as u64);
        message.bytes(2, &number.0);
        log.add(2, &message);
    }
    let mut summary = Message::default();
    for (key, value) in record.summary {
        summary.bytes(1, &item(1, key, value).0);
    }
    log.add(3, &summary);
    // Without a code the exit is a good one.
    log.add(18, &Message::default());
    let folder = format!("wandb/offline-run-19700101_000000-{id}");
    let summary = Value::Object(record.summary.clone()).to_string().into_bytes();
    // While it uploads, wandb writes into `files`, and does not make the folder.
    [(format!("{folder}/run-{id}.wandb"), log.file), (format!("{folder}/files/wandb-summary.json"), summary)]
}

/// A name that runs with other content do not share.
fn id(record: &Record<'_>) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(record.name.as_bytes());
    part(Value::Object(record.config.clone()).to_string().as_bytes());
    for scalar in record.scalars {
        part(format!("{} {} {:?}", scalar.tag, scalar.step, scalar.value).as_bytes());
    }
    hasher.finalize().to_hex()[..8].to_owned()
}

fn run(record: &Record<'_>, id: &str) -> Message {
    let (mut run, mut config) = (Message::default(), Message::default());
    for (key, value) in record.config {
        config.bytes(1, &item(1, key, value).0);
    }
    run.bytes(1, id.as_bytes());
    run.bytes(3, record.project.as_bytes());
    run.bytes(4, &config.0);
    run.bytes(8, record.name.as_bytes());
    run
}

/// The values of each step together, in the order of the steps.
fn history(scalars: &[Scalar]) -> Vec<(usize, Map<String, Value>)> {
    let mut steps: Vec<usize> = scalars.iter().map(|scalar| scalar.step).collect();
    steps.sort_unstable();
    steps.dedup();
    let row = |step: usize| {
        let own = scalars.iter().filter(move |scalar| scalar.step == step);
        let values = own.map(|scalar| (scalar.tag.to_owned(), json!(scalar.value)));
        [("_step".to_owned(), json!(step))].into_iter().chain(values).collect()
    };
    steps.into_iter().map(|step| (step, row(step))).collect()
}

/// A key and a value; history has its keys in another field than config and summary.
fn item(key_field: u32, key: &str, value: &Value) -> Message {
    let mut item = Message::default();
    item.bytes(key_field, key.as_bytes());
    item.bytes(16, value.to_string().as_bytes());
    item
}

/// The file being written.
struct Log {
    file: Vec<u8>,
    records: u64,
}

impl Log {
    fn new() -> Self {
        Self { file: [&b":W&B"[..], &0xBEE1_u16.to_le_bytes(), &[0]].concat(), records: 0 }
    }

    /// A record that holds `message` in `field`.
    fn add(&mut self, field: u32, message: &Message) {
        self.records += 1;
        let mut record = Message::default();
        record.varint(1, self.records);
        record.bytes(field, &message.0);
        let (mut data, mut first) = (&record.0[..], true);
        loop {
            let left = BLOCK - self.file.len() % BLOCK;
            if left < HEAD {
                self.file.resize(self.file.len() + left, 0);
                continue;
            }
            let (part, rest) = data.split_at(data.len().min(left - HEAD));
            let kind = match (first, rest.is_empty()) {
                (true, true) => 1,
                (true, false) => 2,
                (false, false) => 3,
                (false, true) => 4,
            };
            let checksum = crc32(IEEE, [kind].into_iter().chain(part.iter().copied()));
            self.file.extend(checksum.to_le_bytes());
            self.file.extend((part.len() as u16).to_le_bytes());
            self.file.push(kind);
            self.file.extend(part);
            if rest.is_empty() {
                return;
            }
            (data, first) = (rest, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run whose config alone is longer than two blocks, so that every kind of record is there.
    fn long_run() -> [(String, Vec<u8>); 2] {
        let scalar = |tag, step, value| Scalar { tag, step, value };
        let mut scalars: Vec<Scalar> =
            (1..=300).map(|step| scalar("train/loss", step, 2.5 / step as f64)).collect();
        scalars.push(scalar("eval/loss", 300, 0.125));
        let Value::Object(config) = json!({ "rank": 4, "targets": ["q_proj"], "note": "ä".repeat(40_000) })
        else {
            unreachable!()
        };
        let Value::Object(summary) = json!({ "loss": 0.25, "steps": 300, "eval_loss": null }) else {
            unreachable!()
        };
        offline_run(&Record {
            project: "notes",
            name: "adapter",
            config: &config,
            scalars: &scalars,
            summary: &summary,
        })
    }

    #[test]
    fn log_is_the_one_wandb_reads() {
        // Written again by wandb's own writer, byte for byte, and read by its reader: tests/golden/wandb_check.py.
        let [(path, bytes), (beside, _)] = long_run();
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let folder = &path[..42];
        assert_eq!(path, format!("{folder}/run-{}.wandb", &folder[34..]));
        assert_eq!(beside, format!("{folder}/files/wandb-summary.json"));
        assert_eq!(blake3::hash(&bytes), blake3::hash(&fs_err::read(golden.join("run.wandb")).unwrap()));
    }

    #[test]
    fn another_run_has_another_name() {
        let config = Map::new();
        let name = |value| {
            let scalars = [Scalar { tag: "train/loss", step: 1, value }];
            let summary = Map::new();
            offline_run(&Record {
                project: "p",
                name: "n",
                config: &config,
                scalars: &scalars,
                summary: &summary,
            })
        };
        assert_eq!(name(1.0), name(1.0));
        assert_ne!(name(1.0)[0].0, name(2.0)[0].0);
    }
}
