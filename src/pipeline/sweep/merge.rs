//! Joins the pipelines of many trials into one graph: stages that are the same in several trials, needs and
//! parameters alike, become one node. So what trials have in common runs once, however many run at a time.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value};

use crate::graph::{Need, Pipeline, Stage, StageId};
use crate::manifest::label;

/// A trial to be joined: the values that tell it from the others, and its pipeline.
pub(super) struct Part<'a> {
    pub(super) values: Map<String, Value>,
    pub(super) pipeline: &'a Pipeline,
}

/// Many trials in one graph.
pub(super) struct Merged {
    pub(super) pipeline: Pipeline,
    /// For each trial, the node that its objective's stage became.
    pub(super) objectives: Vec<StageId>,
}

/// One node of the graph to be.
struct Node {
    stage: Stage,
    /// Positions of the trials it belongs to.
    trials: Vec<usize>,
}

/// Joins what `stage` needs in each of `parts`, of which there is at least one.
pub(super) fn merge(parts: &[Part<'_>], stage: &str) -> Merged {
    let mut nodes: Vec<Node> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    let mut objectives = Vec::with_capacity(parts.len());
    for (trial, part) in parts.iter().enumerate() {
        let wanted =
            part.pipeline.select(&[stage.to_owned()]).expect("BUG: the objective's stage was checked");
        let mut ids: BTreeMap<StageId, StageId> = BTreeMap::new();
        for id in wanted {
            let own = part.pipeline.stage(id);
            let needs: Vec<Need> = own
                .needs
                .iter()
                .map(|need| Need { slot: need.slot.clone(), stage: ids[&need.stage] })
                .collect();
            let position = *known.entry(identity(own, &needs)).or_insert_with(|| {
                let id = StageId(u32::try_from(nodes.len()).expect("the number of trials is limited"));
                nodes.push(Node { stage: node(own, id, needs), trials: Vec::new() });
                nodes.len() - 1
            });
            nodes[position].trials.push(trial);
            ids.insert(id, nodes[position].stage.id);
            if own.name == stage {
                objectives.push(nodes[position].stage.id);
            }
        }
    }
    name_apart(&mut nodes, parts);
    let first = parts[0].pipeline;
    let pipeline = Pipeline {
        name: first.name.clone(),
        path: first.path.clone(),
        dir: first.dir.clone(),
        params: first.params.clone(),
        stages: nodes.into_iter().map(|node| node.stage).collect(),
    };
    Merged { pipeline, objectives }
}

/// What makes two stages the same: name, kind, parameters, and the nodes they need.
fn identity(stage: &Stage, needs: &[Need]) -> String {
    let needs: Vec<(&str, u32)> = needs.iter().map(|need| (need.slot.as_str(), need.stage.0)).collect();
    serde_json::to_string(&(&stage.name, stage.kind.name(), &stage.with, needs))
        .expect("texts and numbers always have a JSON form")
}

fn node(stage: &Stage, id: StageId, needs: Vec<Need>) -> Stage {
    Stage {
        id,
        name: stage.name.clone(),
        group: stage.group.clone(),
        kind: stage.kind,
        needs,
        with: stage.with.clone(),
        execution: stage.execution.clone(),
        places: stage.places.clone(),
        origins: stage.origins.clone(),
    }
}

/// Gives nodes that come from one stage names of their own: the values on which they differ.
fn name_apart(nodes: &mut [Node], parts: &[Part<'_>]) {
    let axes: BTreeSet<&String> = parts.iter().flat_map(|part| part.values.keys()).collect();
    let mut by_name: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (position, node) in nodes.iter().enumerate() {
        by_name.entry(node.stage.name.clone()).or_default().push(position);
    }
    for (name, positions) in by_name.into_iter().filter(|(_, positions)| positions.len() > 1) {
        let mut taken = BTreeSet::new();
        for position in positions {
            let node = &mut nodes[position];
            let labels: Vec<String> = axes
                .iter()
                .filter_map(|axis| {
                    let value = |trial: usize| parts[trial].values.get(axis.as_str());
                    let first = value(node.trials[0])?;
                    let is_one = node.trials.iter().all(|trial| value(*trial) == Some(first));
                    let differs = (0..parts.len()).any(|trial| value(trial) != Some(first));
                    (is_one && differs).then(|| label(axis, first))
                })
                .collect();
            let plain = format!("{name}-{}", labels.join(","));
            let numbered = (2..).map(|count| format!("{plain}.{count}"));
            let free = std::iter::once(plain.clone()).chain(numbered).find(|name| taken.insert(name.clone()));
            node.stage.group = Some(name.clone());
            node.stage.name = free.expect("there are endless numbers");
        }
    }
}
