//! What a stage takes of the machine: what its manifest says, else what its kind takes.

use std::collections::BTreeSet;

use crate::graph::{Pipeline, Stage, StageId};
use crate::scheduler::{Demand, Machine};
use crate::stage::Cost;

use super::RunnerError;

/// What `stage` takes while it runs. A stage that wants more cores than there are gets all of them: that
/// changes how long it takes, nothing else.
pub(super) fn demand(stage: &Stage, machine: &Machine) -> Demand {
    let execution = &stage.execution;
    let usual = match stage.kind.cost() {
        Cost::Light => 0,
        Cost::Heavy => machine.cpu,
    };
    Demand {
        cpu: execution.cpu.map_or(usual, |cpu| cpu.min(machine.cpu)),
        memory_bytes: execution.memory_bytes.unwrap_or(0),
        gpu: execution.gpu,
    }
}

/// Refuses, before anything runs, a stage that wants more memory or GPUs than there are.
pub(super) fn check(
    pipeline: &Pipeline,
    selected: &BTreeSet<StageId>,
    machine: &Machine,
) -> Result<(), RunnerError> {
    let mib = |bytes: u64| format!("{} MiB of memory", bytes.div_ceil(1 << 20));
    let gpus = |count: usize| format!("{count} GPU{}", if count == 1 { "" } else { "s" });
    for id in selected {
        let stage = pipeline.stage(*id);
        let demand = demand(stage, machine);
        let (wanted, available, option) = if demand.memory_bytes > machine.memory_bytes {
            (mib(demand.memory_bytes), mib(machine.memory_bytes), "--memory")
        } else if demand.gpu > machine.gpus.len() {
            (gpus(demand.gpu), gpus(machine.gpus.len()), "--gpus")
        } else {
            continue;
        };
        return Err(RunnerError::too_much(stage, wanted, available, option));
    }
    Ok(())
}
