//! Pictures of a pipeline: plain text for a terminal, DOT for Graphviz, Mermaid for Markdown. An edge is
//! labelled with the input it fills where that is not the name of the stage that fills it.

use std::fmt::Write;

use crate::graph::{Need, Pipeline, Stage};

impl Pipeline {
    /// One line a stage, in the order they run: name, kind, and what it needs.
    pub fn to_text(&self) -> String {
        let width = |length: fn(&Stage) -> usize| self.stages.iter().map(length).max().unwrap_or(0);
        let name_width = width(|stage| stage.name.len());
        let kind_width = width(|stage| stage.kind.name().len());
        let mut text = String::new();
        for stage in &self.stages {
            let needs: Vec<String> = stage
                .needs
                .iter()
                .map(|need| match self.label(need) {
                    Some(slot) => format!("{slot}: {}", self.stage(need.stage).name),
                    None => self.stage(need.stage).name.clone(),
                })
                .collect();
            let needs = if needs.is_empty() { String::new() } else { format!("<- {}", needs.join(", ")) };
            let line = format!("{:name_width$}  {:kind_width$}  {needs}", stage.name, stage.kind.name());
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// For `dot -Tsvg`.
    pub fn to_dot(&self) -> String {
        let mut dot = format!("digraph \"{}\" {{\n  rankdir=LR;\n  node [shape=box];\n", self.name);
        for stage in &self.stages {
            writeln!(dot, "  \"{0}\" [label=\"{0}\\n{1}\"];", stage.name, stage.kind.name())
                .expect("writing to a string cannot fail");
        }
        for (stage, need) in self.edges() {
            let label = self.label(need).map_or(String::new(), |slot| format!(" [label=\"{slot}\"]"));
            writeln!(dot, "  \"{}\" -> \"{}\"{label};", self.stage(need.stage).name, stage.name)
                .expect("writing to a string cannot fail");
        }
        dot.push_str("}\n");
        dot
    }

    /// For a ```` ```mermaid ```` block. Nodes are numbered, because `end` and the like are words of Mermaid.
    pub fn to_mermaid(&self) -> String {
        let mut mermaid = String::from("flowchart LR\n");
        for stage in &self.stages {
            writeln!(mermaid, "  s{}[\"{}<br/>{}\"]", stage.id.0, stage.name, stage.kind.name())
                .expect("writing to a string cannot fail");
        }
        for (stage, need) in self.edges() {
            let label = self.label(need).map_or(String::new(), |slot| format!("|\"{slot}\"|"));
            writeln!(mermaid, "  s{} -->{label} s{}", need.stage.0, stage.id.0)
                .expect("writing to a string cannot fail");
        }
        mermaid
    }

    fn edges(&self) -> impl Iterator<Item = (&Stage, &Need)> {
        self.stages.iter().flat_map(|stage| stage.needs.iter().map(move |need| (stage, need)))
    }

    /// The slot, where it says more than the stage's name. Slots written by a user may hold any character.
    fn label(&self, need: &Need) -> Option<String> {
        let is_plain = |c: char| !c.is_control() && !matches!(c, '"' | '\\' | '|' | '<' | '>' | '#' | '&');
        (need.slot != self.stage(need.stage).name)
            .then(|| need.slot.chars().map(|c| if is_plain(c) { c } else { '_' }).collect())
    }
}
