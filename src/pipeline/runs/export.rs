//! A run in the forms other tools read: its schedule as a Chrome trace, its metrics as JSON and OpenMetrics,
//! and its provenance as an RO-Crate. Each is made from records alone, so old runs can be exported too.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::digest::Digest;
use crate::stage::OutputFile;
use crate::store::{StoreError, tree_decode};

use super::{RunDetails, Runs};

/// Seconds to the microseconds that a trace counts in.
const MICROSECONDS: f64 = 1e6;

impl RunDetails {
    /// The metrics of every stage: `{"run", "pipeline", "stages": {"adapter": {"loss": 0.5}}}`.
    pub fn metrics(&self) -> Value {
        let stages: Map<String, Value> = self
            .each_stage()
            .map(|stage| (name(stage).to_owned(), stage["metrics"].clone()))
            .filter(|(_, metrics)| metrics.as_object().is_some_and(|metrics| !metrics.is_empty()))
            .collect();
        json!({ "run": self.summary.run, "pipeline": self.summary.pipeline, "stages": stages })
    }

    /// The numbers of every stage as OpenMetrics text (<https://openmetrics.io>).
    pub fn open_metrics(&self) -> String {
        let labels = |stage: &Value| {
            let pairs = [("pipeline", self.summary.pipeline.as_str()), ("stage", name(stage))];
            pairs.map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).join(",")
        };
        let mut text = String::from(
            "# TYPE tunesmith_stage_seconds gauge\n# UNIT tunesmith_stage_seconds seconds\n# HELP tunesmith_stage_seconds How long the stage ran; 0 if its result stood.\n",
        );
        for stage in self.each_stage() {
            let seconds = stage["seconds"].as_f64().unwrap_or(0.0);
            line(&mut text, "tunesmith_stage_seconds", &labels(stage), seconds);
        }
        text.push_str("# TYPE tunesmith_stage_metric gauge\n# HELP tunesmith_stage_metric A number the stage reported.\n");
        for stage in self.each_stage() {
            for (metric, value) in stage["metrics"].as_object().into_iter().flatten() {
                if let Some(value) = value.as_f64() {
                    let labels = format!("{},metric=\"{}\"", labels(stage), escaped(metric));
                    line(&mut text, "tunesmith_stage_metric", &labels, value);
                }
            }
        }
        text.push_str("# EOF\n");
        text
    }

    /// When each stage ran, as a trace for `chrome://tracing` and <https://ui.perfetto.dev>.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn trace(&self) -> Result<Value, StoreError> {
        let journal = fs_err::read_to_string(self.folder.join("journal.jsonl"))?;
        let mut events = Vec::new();
        let mut open: Vec<(String, f64, usize, Value)> = Vec::new();
        for entry in journal.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let (Some(event), Some(at)) = (entry["event"].as_str(), entry["at"].as_f64()) else { continue };
            let stage = entry["stage"].as_str().unwrap_or_default();
            match event {
                "stage_started" => {
                    let lane =
                        (0..).find(|lane| open.iter().all(|(_, _, taken, _)| taken != lane)).unwrap_or(0);
                    let about = json!({ "kind": entry["kind"], "reasons": entry["reasons"] });
                    open.push((stage.to_owned(), at, lane, about));
                }
                "stage_finished" | "stage_failed" => {
                    let Some(position) = open.iter().position(|(name, ..)| name == stage) else { continue };
                    let (name, start, lane, about) = open.remove(position);
                    events.push(json!({
                        "name": name, "cat": event, "ph": "X", "pid": 1, "tid": lane + 1,
                        "ts": start * MICROSECONDS, "dur": (at - start).max(0.0) * MICROSECONDS, "args": about,
                    }));
                }
                _ => {}
            }
        }
        Ok(
            json!({ "displayTimeUnit": "ms", "traceEvents": events, "otherData": { "run": self.summary.run } }),
        )
    }

    fn each_stage(&self) -> impl Iterator<Item = &Value> {
        self.stages.as_array().into_iter().flatten()
    }

    /// The outputs of a stage with the paths at which they stand.
    fn outputs(&self, stage: &str) -> Vec<(String, &Value)> {
        let found = self.each_stage().find(|one| name(one) == stage);
        let outputs = found.and_then(|stage| stage["outputs"].as_array()).into_iter().flatten();
        let folder = format!(
            "out/{}/{}",
            crate::store::folder_name(&self.summary.pipeline),
            crate::store::folder_name(stage)
        );
        outputs
            .map(|output| (format!("{folder}/{}", output["path"].as_str().unwrap_or_default()), output))
            .collect()
    }
}

impl Runs<'_> {
    /// Where everything in a run came from, as the metadata of a Process Run Crate
    /// (<https://w3id.org/ro/wfrun/process>). Paths of results are relative to the store, those of sources to the
    /// manifest.
    ///
    /// # Errors
    /// The record of the pipeline cannot be read.
    pub fn ro_crate(&self, run: &RunDetails) -> Result<Value, StoreError> {
        let pipeline: Value = serde_json::from_slice(&fs_err::read(run.folder.join("pipeline.json"))?)
            .map_err(std::io::Error::from)?;
        let written = |stage: &str| {
            pipeline["stages"].as_array().into_iter().flatten().find(|one| one["name"] == stage)
        };
        let (mut files, mut actions) = (Vec::new(), Vec::new());
        for stage in run.each_stage() {
            let outputs = run.outputs(name(stage));
            files.extend(outputs.iter().map(|(id, output)| {
                json!({
                    "@id": id, "@type": "File", "name": output["path"], "contentSize": output["bytes"].to_string(),
                    "identifier": format!("blake3:{}", output["digest"].as_str().unwrap_or_default()),
                })
            }));
            let sources = self.sources(stage)?;
            files.extend(sources.iter().map(|file| {
                json!({
                    "@id": file.path, "@type": "File", "name": file.path, "contentSize": file.bytes.to_string(),
                    "identifier": format!("blake3:{}", file.digest),
                })
            }));
            let own = written(name(stage)).cloned().unwrap_or_default();
            let needs = own["needs"].as_object().cloned().unwrap_or_default();
            let inputs = needs.values().filter_map(Value::as_str).flat_map(|need| run.outputs(need));
            actions.push(json!({
                "@id": format!("#{}", name(stage)),
                "@type": "CreateAction",
                "name": format!("{} ({})", name(stage), own["uses"].as_str().unwrap_or_default()),
                "instrument": { "@id": "https://github.com/tunesmith/tunesmith" },
                "identifier": stage["key"],
                "description": own["with"].to_string(),
                "object": inputs.map(|(id, _)| id).chain(sources.into_iter().map(|file| file.path))
                    .map(|id| json!({ "@id": id })).collect::<Vec<_>>(),
                "result": outputs.iter().map(|(id, _)| json!({ "@id": id })).collect::<Vec<_>>(),
                "actionStatus": match stage["state"].as_str() {
                    Some("cached" | "ran") => "http://schema.org/CompletedActionStatus",
                    _ => "http://schema.org/FailedActionStatus",
                },
            }));
        }
        // Two stages may read one note.
        let mut seen = BTreeSet::new();
        files.retain(|file: &Value| seen.insert(file["@id"].to_string()));
        let references = |nodes: &[Value]| -> Vec<Value> {
            nodes.iter().map(|node| json!({ "@id": node["@id"] })).collect()
        };
        let profile = "https://w3id.org/ro/wfrun/process/0.5";
        let mut graph = vec![
            json!({
                "@id": "ro-crate-metadata.json", "@type": "CreativeWork", "about": { "@id": "./" },
                "conformsTo": { "@id": "https://w3id.org/ro/crate/1.1" },
            }),
            json!({
                "@id": "./", "@type": "Dataset", "name": run.summary.pipeline, "identifier": run.summary.run,
                "datePublished": run.summary.started, "license": "not stated",
                "description": format!("Results of {} and what they were made from", run.summary.manifest),
                "conformsTo": { "@id": profile }, "hasPart": references(&files), "mentions": references(&actions),
            }),
            json!({ "@id": profile, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5" }),
            json!({
                "@id": "https://github.com/tunesmith/tunesmith", "@type": "SoftwareApplication",
                "name": "tunesmith", "softwareVersion": pipeline["runner"],
            }),
        ];
        graph.extend(files);
        graph.extend(actions);
        Ok(json!({ "@context": "https://w3id.org/ro/crate/1.1/context", "@graph": graph }))
    }

    /// The files a stage read from beside its manifest, as far as they are still known.
    fn sources(&self, stage: &Value) -> Result<Vec<OutputFile>, StoreError> {
        let key = stage["key"].as_str().and_then(|key| key.parse::<Digest>().ok());
        let Some(record) = key.map(|key| self.store.action(key)).transpose()?.flatten() else {
            return Ok(Vec::new());
        };
        let mut files = Vec::new();
        for part in record.parts.iter().filter(|part| part.name.starts_with("source.")) {
            let Ok(tree) = part.value.parse::<Digest>() else { continue };
            let listing = self.store.read_object(tree)?.and_then(|bytes| tree_decode(&bytes));
            files.extend(listing.unwrap_or_default());
        }
        Ok(files)
    }
}

fn name(stage: &Value) -> &str {
    stage["name"].as_str().unwrap_or_default()
}

fn line(text: &mut String, metric: &str, labels: &str, value: f64) {
    writeln!(text, "{metric}{{{labels}}} {value}").expect("a string takes everything");
}

/// A label's value, as OpenMetrics wants it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
