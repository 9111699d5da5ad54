//! `tunesmith`: one binary that turns a person's notes into their own assistant model.

mod corpus;
mod llm;
mod stages;

fn main() {
    let _ = stages::STAGES;
}
