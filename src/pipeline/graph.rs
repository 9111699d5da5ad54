//! The resolved pipeline: stages and their edges, in an order in which each comes after its needs.
//! Knows nothing of YAML, keys or running; petgraph stays in here.

mod render;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::path::PathBuf;
use std::time::Duration;

use petgraph::algo::kosaraju_scc;
use petgraph::graph::DiGraph;
use serde_json::Value;

use crate::manifest;
use crate::stage::StageKind;
/// Index of a stage in [`Pipeline::stages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StageId(pub u32);

/// One edge: the stage `stage` fills the input slot `slot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Name of the input slot (for `Arity::Any` slots: the key in `needs`, or the stage's name).
    pub slot: String,
    /// The stage that fills it.
    pub stage: StageId,
}

/// Where something stands in a manifest file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The manifest or included file.
    pub file: PathBuf,
    /// 1-based.
    pub line: usize,
    /// 1-based, in characters.
    pub column: usize,
}

/// One stage, fully resolved: nothing left to interpolate.
pub struct Stage {
    /// Its index.
    pub id: StageId,
    /// Its name in the manifest; of a stage with a matrix `<name>-<axis>=<value>,…`.
    pub name: String,
    /// For a node of a stage with a matrix, or of a sweep: the stage's name in the manifest.
    pub group: Option<String>,
    /// What it does.
    pub kind: &'static dyn StageKind,
    /// Its inputs.
    pub needs: Vec<Need>,
    /// Its parameters, an object; defaults are not filled in.
    pub with: Value,
    /// How it is run; no part of its key.
    pub execution: Execution,
    /// Where each parameter was written, by dotted path; "" is the stage itself.
    pub places: BTreeMap<String, Place>,
    /// The references each parameter was filled in from, by dotted path.
    pub origins: BTreeMap<String, Origin>,
}

/// How a stage is run. Changes no result.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Execution {
    /// Cores it takes; `None`: what its kind takes.
    pub cpu: Option<u32>,
    /// Memory it takes.
    pub memory_bytes: Option<u64>,
    /// GPUs it takes.
    pub gpu: usize,
    /// How long it may run.
    pub timeout: Option<Duration>,
    /// How often it is tried again after an error that may pass.
    pub retries: u32,
}

/// What the value of a parameter was filled in from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// It is the value of one reference: `params.lr`.
    Whole(String),
    /// It is a text with references in it.
    Inside(Vec<String>),
}

/// A manifest after includes, profile, overrides and interpolation, checked and in topological order.
pub struct Pipeline {
    /// `name:` of the manifest, else its file stem.
    pub name: String,
    /// The manifest file.
    pub path: PathBuf,
    /// The folder the manifest is in; relative paths in it start here.
    pub dir: PathBuf,
    /// The resolved params, an object.
    pub params: Value,
    /// The stages; `stages[id.0]`, each after its needs.
    pub stages: Vec<Stage>,
}

/// A stage was asked for that the pipeline does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the pipeline has no stage `{name}`")]
pub struct UnknownStage {
    /// What was asked for.
    pub name: String,
    /// What may have been meant, or what there is.
    pub hint: String,
}

impl Stage {
    /// Where the parameter at a dotted path was written, or the nearest thing around it; at last the stage.
    pub fn place(&self, path: &str) -> Option<&Place> {
        let mut path = path;
        loop {
            if let Some(place) = self.places.get(path) {
                return Some(place);
            }
            path = path.rsplit_once('.').map_or("", |(outer, _)| outer);
            if path.is_empty() {
                return self.places.get("");
            }
        }
    }
}

impl Stage {
    /// Where the value of the parameter at a dotted path was filled in from: `params.lr`.
    pub fn origin(&self, path: &str) -> Option<String> {
        let mut outer = path;
        loop {
            match self.origins.get(outer) {
                Some(Origin::Whole(reference)) => {
                    return Some(format!("{reference}{}", &path[outer.len()..]));
                }
                Some(Origin::Inside(references)) => return Some(references.join(", ")),
                None => outer = outer.rsplit_once('.')?.0,
            }
        }
    }
}

impl Pipeline {
    /// The stage with this index.
    pub fn stage(&self, id: StageId) -> &Stage {
        &self.stages[id.0 as usize]
    }

    /// The stage with this name.
    ///
    /// # Errors
    /// There is none; the error says which one may be meant.
    pub fn find(&self, name: &str) -> Result<&Stage, UnknownStage> {
        let found = self.stages.iter().find(|stage| stage.name == name);
        found.ok_or_else(|| UnknownStage {
            name: name.to_owned(),
            hint: manifest::suggestion(name, self.stages.iter().map(|stage| stage.name.as_str()))
                .unwrap_or_else(|| "it has none at all".to_owned()),
        })
    }

    /// The named stages and everything they need, in order; all stages if none is named.
    ///
    /// # Errors
    /// A name that no stage has.
    pub fn select(&self, names: &[String]) -> Result<Vec<StageId>, UnknownStage> {
        let mut is_wanted = vec![names.is_empty(); self.stages.len()];
        for name in names {
            is_wanted[self.find(name)?.id.0 as usize] = true;
        }
        // Needs come before their stage, so one walk from the end reaches all of them.
        for stage in self.stages.iter().rev() {
            if is_wanted[stage.id.0 as usize] {
                for need in &stage.needs {
                    is_wanted[need.stage.0 as usize] = true;
                }
            }
        }
        Ok(self.stages.iter().map(|stage| stage.id).filter(|id| is_wanted[id.0 as usize]).collect())
    }
}

/// Every index after those it needs, and otherwise in ascending order; or the cycles, each as the indices on
/// its way round, starting at its smallest.
pub(crate) fn order(needs: &[Vec<usize>]) -> Result<Vec<usize>, Vec<Vec<usize>>> {
    let mut needed_by = vec![Vec::new(); needs.len()];
    let mut open_needs = vec![0_usize; needs.len()];
    for (stage, needed) in needs.iter().enumerate() {
        open_needs[stage] = needed.len();
        for &need in needed {
            needed_by[need].push(stage);
        }
    }
    let ready = open_needs.iter().enumerate().filter(|(_, open)| **open == 0);
    let mut ready: BinaryHeap<Reverse<usize>> = ready.map(|(stage, _)| Reverse(stage)).collect();
    let mut order = Vec::with_capacity(needs.len());
    while let Some(Reverse(stage)) = ready.pop() {
        order.push(stage);
        for &next in &needed_by[stage] {
            open_needs[next] -= 1;
            if open_needs[next] == 0 {
                ready.push(Reverse(next));
            }
        }
    }
    if order.len() == needs.len() { Ok(order) } else { Err(cycles(needs)) }
}

/// One cycle through every group of stages that reach each other.
fn cycles(needs: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut graph = DiGraph::<(), (), usize>::default();
    let nodes: Vec<_> = needs.iter().map(|_| graph.add_node(())).collect();
    for (stage, needed) in needs.iter().enumerate() {
        for &need in needed {
            graph.add_edge(nodes[stage], nodes[need], ());
        }
    }
    let groups = kosaraju_scc(&graph);
    let mut group_of = vec![0; needs.len()];
    for (group, members) in groups.iter().enumerate() {
        for member in members {
            group_of[member.index()] = group;
        }
    }
    let mut cycles: Vec<Vec<usize>> = groups
        .iter()
        .filter_map(|members| members.iter().map(|member| member.index()).min())
        .filter_map(|first| cycle_from(first, needs, &group_of))
        .collect();
    cycles.sort();
    cycles
}

/// The shortest way from `first` back to itself inside its group.
fn cycle_from(first: usize, needs: &[Vec<usize>], group_of: &[usize]) -> Option<Vec<usize>> {
    let mut came_from = BTreeMap::new();
    let mut queue = std::collections::VecDeque::from([first]);
    while let Some(stage) = queue.pop_front() {
        for &need in needs[stage].iter().filter(|need| group_of[**need] == group_of[first]) {
            if need == first {
                let back = std::iter::successors(Some(stage), |stage| came_from.get(stage).copied());
                let mut cycle: Vec<usize> = back.collect();
                cycle.reverse();
                return Some(cycle);
            }
            if let std::collections::btree_map::Entry::Vacant(entry) = came_from.entry(need) {
                entry.insert(stage);
                queue.push_back(need);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn order_is_the_manifests_where_needs_allow_it() {
        assert_eq!(order(&[vec![], vec![], vec![]]).unwrap(), [0, 1, 2]);
        assert_eq!(order(&[vec![2], vec![], vec![]]).unwrap(), [1, 2, 0]);
        assert_eq!(order(&[vec![3], vec![0], vec![], vec![]]).unwrap(), [2, 3, 0, 1]);
    }

    #[test]
    fn every_cycle_is_found_once_and_starts_at_its_first_stage() {
        let needs = [vec![1], vec![0], vec![0], vec![4], vec![5], vec![3], vec![6]];
        assert_eq!(order(&needs).unwrap_err(), [vec![0, 1], vec![3, 4, 5], vec![6]]);
    }

    #[test]
    fn a_long_chain_and_a_long_circle_need_no_deep_stack() {
        let chain: Vec<Vec<usize>> =
            (0..100_000_usize).map(|i| i.checked_sub(1).into_iter().collect()).collect();
        assert_eq!(order(&chain).unwrap().len(), chain.len());
        let circle: Vec<Vec<usize>> = (0..100_000_usize).map(|i| vec![(i + 1) % 100_000]).collect();
        assert_eq!(order(&circle).unwrap_err()[0].len(), circle.len());
    }

    proptest! {
        #[test]
        fn in_an_acyclic_graph_needs_come_first(
            edges in prop::collection::vec((0_usize..30, 0_usize..30), 0..100)
        ) {
            let mut needs = vec![Vec::new(); 30];
            for (a, b) in edges.into_iter().filter(|(a, b)| a != b) {
                needs[(a.max(b) * 7) % 30].push((a.min(b) * 7) % 30);
            }
            let order = order(&needs).unwrap();
            let position = |stage: usize| order.iter().position(|other| *other == stage).unwrap();
            for (stage, needed) in needs.iter().enumerate() {
                prop_assert!(needed.iter().all(|need| position(*need) < position(stage)));
            }
        }
    }
}
