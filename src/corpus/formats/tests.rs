//! One row of each format, and what is wrong with each kind of bad one.

use super::*;

fn read(path: &str, text: &str) -> Vec<Example> {
    read_examples(path, text.as_bytes(), Format::Auto, None).unwrap()
}

fn turns_of(example: &Example) -> Vec<(&str, &str)> {
    example.messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect()
}

/// Each format says the same conversation.
#[test]
fn every_format_gives_the_same_conversation() {
    for (name, row) in [
        (
            "messages",
            r#"{"messages":[{"role":"user","content":"Hi?"},{"role":"assistant","content":"Yes."}]}"#,
        ),
        ("sharegpt", r#"{"conversations":[{"from":"human","value":"Hi?"},{"from":"gpt","value":"Yes."}]}"#),
        ("alpaca", r#"{"instruction":"Hi?","input":"","output":"Yes."}"#),
        ("prompt-completion", r#"{"prompt":"Hi?","completion":"Yes."}"#),
        (
            "prompt-completion",
            r#"{"prompt":[{"role":"user","content":"Hi?"}],"completion":[{"role":"assistant","content":"Yes."}]}"#,
        ),
        ("questions", r#"{"question":"Hi?","answer":"Yes."}"#),
    ] {
        let rows = read("data.jsonl", row);
        assert_eq!(turns_of(&rows[0]), [("user", "Hi?"), ("assistant", "Yes.")], "{row}");
        assert_eq!(rows[0].provenance.generator, format!("load:{name}"));
        assert_eq!(rows[0].provenance.places, ["data.jsonl line 1"]);
        assert_eq!(rows[0].group, rows[0].id);
    }
}

#[test]
fn alpaca_input_follows_the_instruction_and_extra_columns_are_tags() {
    let row = r#"{"instruction":"Write.","context":"To Ann","response":"Dear Ann","category":"email","score":5,"note":"0123456789012345678901234567890123456789x"}"#;
    let example = &read("dolly.jsonl", row)[0];
    assert_eq!(example.question(), "Write.\n\nTo Ann");
    assert_eq!(example.tags, ["category:email", "score:5"]);
}

#[test]
fn questions_keep_fact_key_facts_source_and_evidence() {
    let row = r#"{"id":"q-1","question":"Hi?","answer":"Yes.","fact":"f","key_facts":[["1,130","1130"],"Tuesday"],"source":"notes/a.md","category":"email-summary","evidence":"It is."}"#;
    let example = &read("q.jsonl", row)[0];
    assert_eq!((example.id.as_str(), example.group.as_str()), ("q-1", "f"));
    assert_eq!(example.key_facts, [vec!["1,130", "1130"], vec!["Tuesday"]]);
    assert_eq!(example.tags, ["category:email-summary"]);
    assert_eq!(example.provenance.places, ["q.jsonl line 1", "notes/a.md"]);
    assert_eq!(example.provenance.evidence.as_deref(), Some("It is."));
}

#[test]
fn an_array_knows_its_lines() {
    let text = "[\n  {\"question\": \"a\",\n   \"answer\": \"b\"},\n  {\"question\": \"c\"}\n]\n";
    let bad = read_examples("a.json", text.as_bytes(), Format::Auto, None).unwrap_err();
    assert_eq!(bad, [BadRow { line: 4, reason: "no `answer`".to_owned() }]);
    let bad =
        read_examples("a.json", b"[{\"question\":\"a\",\"answer\":\"b\"},\n{oops}]", Format::Auto, None)
            .unwrap_err();
    assert_eq!(bad[0].line, 2);
}

#[test]
fn csv_columns_say_the_shape() {
    let rows = read("x.csv", "instruction,input,output,category\n\"Say \"\"hi\"\"\",,Hi,chat\n");
    assert_eq!(turns_of(&rows[0]), [("user", "Say \"hi\""), ("assistant", "Hi")]);
    assert_eq!(rows[0].tags, ["category:chat"]);
}

#[test]
fn all_bad_rows_are_named_at_once() {
    let text = "{\"question\":\"a\",\"answer\":\"b\"}\nnot json\n[1]\n{\"question\":\"a\"}\n{\"question\":[],\"answer\":\"b\"}\n";
    let bad = read_examples("x.jsonl", text.as_bytes(), Format::Auto, None).unwrap_err();
    assert_eq!(bad.iter().map(|row| row.line).collect::<Vec<_>>(), [2, 3, 4, 5]);
    assert_eq!(bad[3].reason, "`question` is not a text but `[]`");
    assert!(bad[0].reason.starts_with("not JSON: "), "{}", bad[0].reason);
}

#[test]
fn turns_out_of_order_are_refused() {
    let check = |turns: &str, expected: &str| {
        let row = format!("{{\"messages\":[{turns}]}}");
        let bad = read_examples("x.jsonl", row.as_bytes(), Format::Auto, None).unwrap_err();
        assert_eq!(bad[0].reason, expected);
    };
    let turn = |role: &str| format!("{{\"role\":\"{role}\",\"content\":\"x\"}}");
    check("", "the conversation has no turns");
    check(&turn("user"), "the last turn is not the assistant's, so there is nothing to learn");
    check(&turn("assistant"), "turn 1 is from `assistant`, where `user` must speak");
    check(
        &format!("{},{}", turn("user"), turn("user")),
        "turn 2 is from `user`, where `assistant` must speak",
    );
    check(&turn("tool"), "turn 1 of `messages` has the unknown speaker `tool`");
}

#[test]
fn empty_foreign_and_binary_files_are_errors() {
    let check = |bytes: &[u8], expected: &str| {
        let bad = read_examples("x.jsonl", bytes, Format::Auto, None).unwrap_err();
        assert!(bad[0].reason.contains(expected), "{}", bad[0].reason);
    };
    check(b"", "the file holds no rows");
    check(b"\n\n", "the file holds no rows");
    check(b"[]", "the file holds no rows");
    check(b"{\"a\":1}", "no known form: it has `a`");
    check(b"{\"question\":\"\xff\"}", "not UTF-8");
    assert_eq!(read("x.jsonl", "\u{feff}{\"question\":\"a\",\"answer\":\"b\"}").len(), 1);
}

#[test]
fn a_group_column_must_be_there() {
    let text =
        "{\"question\":\"a\",\"answer\":\"b\",\"meeting\":\"m1\"}\n{\"question\":\"c\",\"answer\":\"d\"}\n";
    let bad = read_examples("x.jsonl", text.as_bytes(), Format::Auto, Some("meeting")).unwrap_err();
    assert_eq!(bad, [BadRow { line: 2, reason: "no `meeting`, which `group_by` names".to_owned() }]);
}

#[test]
fn our_own_examples_read_back_unchanged() {
    let row = r#"{"question":"Hi?","answer":"Yes.","id":"q","fact":"f","key_facts":["x"],"category":"c","evidence":"E"}"#;
    let first = read("q.jsonl", row);
    let again = read("copy.jsonl", &serde_json::to_string(&first[0]).unwrap());
    assert_eq!(first, again);
}
