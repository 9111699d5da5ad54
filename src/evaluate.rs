//! Judging answers: right or wrong against key facts, how sure a figure is, and what looks too good to be true.
//! Works on texts and numbers; knows no model and no file.

pub(crate) mod flags;
pub(crate) mod intervals;
pub(crate) mod results;
pub(crate) mod scoring;
