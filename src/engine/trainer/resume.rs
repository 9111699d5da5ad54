//! A run's way into a checkpoint and back. Knows what makes two runs the same: options, rows, base and numerics.
//! The file itself is `checkpoint`'s.

use crate::adapter::Adapter;
use crate::optimizer::StatePart;

use super::checkpoint::Header;
use super::events::TrainHooks;
use super::examples::TokenizedExample;
use super::options::{TrainError, TrainOptions};
use super::{Keep, Run};

impl Run<'_> {
    /// Puts the run where its newest checkpoint left it, if there is one. Files that do not fit are warned of.
    pub(super) fn resume(&mut self, hooks: &mut dyn TrainHooks) -> Result<(), TrainError> {
        let Some(folder) = &self.options.checkpoints else {
            return Ok(());
        };
        let failed = |source| TrainError::Checkpoint { dir: folder.dir.clone(), source };
        let found = folder.newest(&self.identity(), self.adapter.parameter_count()).map_err(failed)?;
        for (path, reason) in found.passed_over {
            hooks.warn(&format!("checkpoint `{}` is passed over: {reason}", path.display()));
        }
        let Some(checkpoint) = found.newest else {
            return Ok(());
        };
        if !self.optimizer.resume(checkpoint.header.step as u64, &checkpoint.optimizer) {
            let source = std::io::Error::other("the optimizer's state is of another size");
            return Err(TrainError::Checkpoint { dir: folder.dir.clone(), source });
        }
        set_values(&mut self.adapter, &checkpoint.adapter);
        self.step = checkpoint.header.step;
        self.best = checkpoint.best.filter(|_| self.options.keep == Keep::Best);
        self.losses = checkpoint.header.losses;
        self.evals = checkpoint.header.evals;
        self.warnings = checkpoint.header.warnings;
        Ok(())
    }

    /// Writes a checkpoint, if the options name a folder.
    pub(super) fn save(&self) -> Result<(), TrainError> {
        let Some(folder) = &self.options.checkpoints else {
            return Ok(());
        };
        let header = Header {
            identity: self.identity(),
            step: self.step,
            losses: self.losses.clone(),
            evals: self.evals.clone(),
            warnings: self.warnings.clone(),
            parameters: self.adapter.parameter_count(),
            optimizer_bytes: self.optimizer.state_bytes(),
            has_best: self.best.is_some(),
        };
        let adapter = self.adapter.parameters().map(|(_, values)| StatePart::Floats(values));
        let best = self.best.as_deref().map(StatePart::Floats);
        folder
            .write(&header, adapter.chain(self.optimizer.state()).chain(best))
            .map_err(|source| TrainError::Checkpoint { dir: folder.dir.clone(), source })
    }

    /// The digest of all that the run's result depends on.
    fn identity(&self) -> String {
        let mut parts = Parts(blake3::Hasher::new());
        parts.add(b"training 3");
        // `Debug` of a float is its shortest text that reads back as the same bits.
        let options = TrainOptions { checkpoints: None, memory_budget: None, ..self.options.clone() };
        parts.add(format!("{options:?}").as_bytes());
        let base = self.options.checkpoints.as_ref().map_or("", |folder| folder.identity.as_str());
        parts.add(base.as_bytes());
        parts.add(self.model.numerics().as_bytes());
        for (name, values) in self.adapter.parameters() {
            parts.add(format!("{name} {}", values.len()).as_bytes());
        }
        for rows in [self.train, self.validation] {
            parts.add(&(rows.len() as u64).to_le_bytes());
            rows.iter().for_each(|row| parts.add_row(row));
        }
        parts.0.finalize().to_hex().to_string()
    }
}

/// A digest of length-prefixed parts.
struct Parts(blake3::Hasher);

impl Parts {
    fn add(&mut self, part: &[u8]) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    fn add_row(&mut self, row: &TokenizedExample) {
        self.add(row.id.as_bytes());
        self.add(&row.tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<_>>());
        self.add(&row.supervised.iter().map(|&supervised| u8::from(supervised)).collect::<Vec<_>>());
    }
}

/// The adapter's values, tensors one after another.
pub(super) fn values(adapter: &Adapter) -> Vec<f32> {
    adapter.parameters().flat_map(|(_, values)| values).copied().collect()
}

/// Replaces the adapter's values by those that [`values`] gave.
pub(super) fn set_values(adapter: &mut Adapter, mut values: &[f32]) {
    for (_, own) in adapter.parameters_mut() {
        let (head, rest) = values.split_at(own.len());
        own.copy_from_slice(head);
        values = rest;
    }
}
