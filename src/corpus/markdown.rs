//! A Markdown note, Obsidian's dialect included, to clean text. Headings stay `# ` lines, lists `- ` lines, code
//! stays code; links, images, emphasis and comments leave only their words. Knows no file: it takes a text.
//!
//! ```text
//! text ─► front_matter ─► source (comments, template tags) ─► pulldown-cmark ─► writer ─► Note
//! ```

use pulldown_cmark::{Options, Parser, TextMergeWithOffset};
use serde_json::{Map, Value};

use super::clean::{characters, tidy};
use super::front_matter;

mod html;
mod source;
mod writer;

/// A note that was read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Note {
    /// Front matter, with `tags` as one list of all tags of the note, those in its text too.
    pub(crate) meta: Map<String, Value>,
    /// From the front matter, or the first heading of level 1.
    pub(crate) title: Option<String>,
    /// Clean text.
    pub(crate) text: String,
    /// What is wrong with the front matter, if anything; the text is right all the same.
    pub(crate) front_matter_problem: Option<String>,
}

/// Reads a note.
pub(crate) fn read(text: &str) -> Note {
    let text = characters(text);
    let parted = front_matter::part(&text);
    let body = source::strip(parted.body);
    let options = Options::ENABLE_TABLES
        | Options::ENABLE_FOOTNOTES
        | Options::ENABLE_STRIKETHROUGH
        | Options::ENABLE_TASKLISTS
        | Options::ENABLE_HEADING_ATTRIBUTES
        | Options::ENABLE_MATH
        | Options::ENABLE_WIKILINKS;
    let written =
        writer::write(&body, TextMergeWithOffset::new(Parser::new_ext(&body, options).into_offset_iter()));
    let mut meta = parted.meta;
    let mut tags = front_matter::tags(&meta);
    tags.extend(written.tags);
    let mut seen = std::collections::BTreeSet::new();
    tags.retain(|tag| seen.insert(tag.clone()));
    if !tags.is_empty() {
        meta.insert("tags".to_owned(), tags.into());
    }
    if let Some(problem) = &parted.problem {
        meta.insert("front_matter_error".to_owned(), problem.clone().into());
    }
    let title = meta.get("title").and_then(Value::as_str).map(str::trim).filter(|title| !title.is_empty());
    let title = title.map(str::to_owned).or(written.title);
    Note { title, meta, text: tidy(&written.text), front_matter_problem: parted.problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    fn check(source: &str, expect: &Expect) {
        expect.assert_eq(&read(source).text);
    }

    #[test]
    fn wikilinks_leave_the_words_a_reader_sees() {
        check(
            "See [[Budget 2024|the budget]], [[People/Ann Lee]], [[Plan#Risks]], [[#Next steps]] and [[Plan#^a1b2]].",
            &expect!["See the budget, Ann Lee, Plan > Risks, Next steps and Plan."],
        );
    }

    #[test]
    fn embeds_of_media_vanish_and_of_notes_leave_their_name() {
        check(
            "![[photo.png|300]] ![[scan.pdf]] ![[Goals]] ![a chart](c.png) ![](d.png)",
            &expect!["Goals a chart"],
        );
    }

    #[test]
    fn links_and_emphasis_leave_their_text() {
        check(
            "**Bold** and *kind* [guide](https://x.org/a?b) to `code`, ~~gone~~ ==lit==, <https://x.org>",
            &expect!["Bold and kind guide to `code`, gone lit, https://x.org"],
        );
    }

    #[test]
    fn comments_of_every_kind_are_dropped() {
        check(
            "Keep %%not this%% and <!-- nor this --> this.\n\n%%\nblock\n\ncomment\n%%\n\n<!--\n\nhidden\n-->\n\n`%%kept%%`\n\n```\n%%kept%%\n```\n",
            &expect![[r#"
                Keep and this.

                `%%kept%%`

                ```
                %%kept%%
                ```"#]],
        );
    }

    #[test]
    fn lists_keep_their_shape() {
        check(
            "Before\n- one\n  - deep\n    more\n- [x] done\n- [ ] open\n\n1. first\n\n   second paragraph\n2. next\n",
            &expect![[r#"
                Before

                - one
                  - deep more
                - [x] done
                - [ ] open
                1. first

                   second paragraph
                2. next"#]],
        );
    }

    #[test]
    fn wrapped_lines_are_joined_by_the_width_of_their_source() {
        check(
            "We work with partners and use [tools](https://x.org/a/very/long/path) to\nmodel open teams. Our aim is to show the value of technical experts and\nGreat People.\n\nAnn: yes\nBo: no\n\n- an item that\n  goes on\n  - below\n",
            &expect![[r#"
                We work with partners and use tools to model open teams. Our aim is to show the value of technical experts and Great People.

                Ann: yes
                Bo: no

                - an item that goes on
                  - below"#]],
        );
    }

    #[test]
    fn headings_quotes_and_callouts() {
        check(
            "# Top {#id}\nText ^block1\n\n## Sub *part*\n> [!warning]- Mind this\n> body\n\n> plain\n> > deep\n",
            &expect![[r#"
                # Top

                Text

                ## Sub part

                > Mind this
                > body

                > plain

                > > deep"#]],
        );
    }

    #[test]
    fn table_rows_stand_alone() {
        check(
            "| Who | Role |\n|---|---|\n| Ann | lead |\n| Bo | |\n",
            &expect![[r#"
                Who: Ann | Role: lead
                Who: Bo"#]],
        );
    }

    #[test]
    fn html_leaves_its_text() {
        check(
            "<div class=\"x\"><b>Bold</b> &amp; more<br>next</div>\n\n<ul><li>one</li><li>two</li></ul>\n\nA <kbd>key</kbd> here<br/>there\n\n<script>no()</script>\n",
            &expect![[r#"
                Bold & more
                next

                - one
                - two

                A key here
                there"#]],
        );
    }

    #[test]
    fn template_tags_vanish_and_titles_in_them_stay() {
        check(
            "{% comment %}no{% endcomment %}[Leave]({% page \"/leave/\" %}) in {% slack_channel \"people-ops\" %}.\n\n{% alert \"New rule\" %}\nAsk first.\n{% endalert %}\n",
            &expect![[r#"
                Leave in people-ops.

                New rule
                Ask first."#]],
        );
    }

    #[test]
    fn footnotes_and_math_are_kept() {
        check(
            "Fact[^1] $x^2$.\n\n[^1]: Source\n",
            &expect![[r#"
            Fact[^1] $x^2$.

            [^1]: Source"#]],
        );
    }

    #[test]
    fn tags_of_text_and_front_matter_are_one_list() {
        let note = read("---\ntags: [lead]\n---\n#reflection on #work/team and #1 `#code`, c#sharp #lead\n");
        assert_eq!(note.meta["tags"], serde_json::json!(["lead", "reflection", "work/team"]));
        assert!(note.text.contains("#reflection"));
    }

    #[test]
    fn titles_come_from_front_matter_then_heading() {
        assert_eq!(read("---\ntitle: A\n---\n# B\n").title.as_deref(), Some("A"));
        assert_eq!(read("# B\ntext").title.as_deref(), Some("B"));
        assert_eq!(read("## Albums\ntext").title, None);
    }

    #[test]
    fn broken_front_matter_costs_only_itself() {
        let note = read("---\ntitle: [open\n---\nThe text.\n");
        assert_eq!(note.text, "The text.");
        assert!(note.front_matter_problem.is_some());
        assert!(note.meta.contains_key("front_matter_error"));
    }

    #[test]
    fn widgets_of_plugins_are_no_text() {
        check(
            "A\n\n```dataview\nTABLE x\n```\n\n```rust\nfn f() {}\n```\n",
            &expect![[r#"
            A

            ```rust
            fn f() {}
            ```"#]],
        );
    }
}
