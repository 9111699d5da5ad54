//! Rows of a recording and of a live server become examples, once.

use super::*;
use crate::corpus::Source;
use crate::llm::test_server::{Server, completion, http};
use crate::stages::harness::{Bench, Outcome};

fn chunk(path: &str, at: usize, text: &str) -> Chunk {
    Chunk {
        id: format!("{path}@{at}"),
        document: path.to_owned(),
        source: Source { path: path.to_owned(), page: None, digest: "0".repeat(64) },
        headings: vec!["First week".to_owned()],
        span: [at, at + text.len()],
        text: text.to_owned(),
        tokens: 9,
    }
}

fn chunks() -> Vec<Chunk> {
    vec![
        chunk("exec/notes/a.md", 0, "It stood at 1,130 on Friday."),
        chunk("exec/notes/a.md", 90, "Owen keeps sales {chunk} and {n}."),
        chunk("exec/notes/b.md", 0, "Nothing to see."),
    ]
}

const RECORDING_ROWS: &str = r#"{"source":"notes/a.md","quote":"1,130 on Friday","response":"{\"examples\":[{\"question\":\"How many?\",\"answer\":\"It stood at 1,130.\",\"fact\":\"backlog\"},{\"question\":\"What number?\",\"answer\":\"It stood at 1,130.\",\"fact\":\"backlog\"}]}"}
{"source":"notes/a.md","quote":"Owen keeps sales","response":"{\"examples\":[{\"question\":\"Who keeps sales?\",\"answer\":\"Owen keeps sales.\"}]}"}
{"source":"notes/a.md","quote":"Owen keeps sales","response":"Sure! Here are the pairs:\n{\"examples\":[]}"}
"#;

fn replay() -> Value {
    json!({ "provider": { "type": "replay", "path": "exec/answers.jsonl" }, "system": "Be brief." })
}

fn bench(rows: &str) -> Bench {
    let mut bench = Bench::new();
    bench.table("chunks", "chunks.jsonl", &chunks());
    bench.source(RECORDING, "exec/answers.jsonl", rows.as_bytes());
    bench
}

fn examples(outcome: &Outcome) -> Vec<Example> {
    outcome.table("examples.jsonl")
}

#[test]
fn recorded_answers_become_examples_with_provenance() {
    let outcome = bench(RECORDING_ROWS).run(&Generate, replay()).unwrap();
    let rows = examples(&outcome);
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0].group, "backlog");
    assert_eq!(rows[2].group, "exec/notes/a.md@90");
    assert_eq!(rows[0].messages[0], Message { role: "system".to_owned(), content: "Be brief.".to_owned() });
    let provenance = &rows[0].provenance;
    assert_eq!(provenance.chunks, ["exec/notes/a.md@0"]);
    assert_eq!(provenance.places, ["exec/notes/a.md § First week"]);
    assert_eq!(provenance.generator, "replay:answers.jsonl");
    assert_eq!(provenance.evidence.as_deref(), Some("It stood at 1,130 on Friday."));
    for (name, count) in [("chunks", 3), ("chunks_answered", 2), ("examples", 3), ("rejected", 1)] {
        assert_eq!(outcome.count(name), count, "{name}");
    }
    let rejected: Vec<Value> = outcome.table("rejected.jsonl");
    assert_eq!(rejected[0]["chunk"], "exec/notes/a.md@90");
    assert!(rejected[0]["reason"].as_str().unwrap().starts_with("it is not one JSON object"));
    assert!(outcome.messages[0].contains("`exec/notes/a.md@90`"));
}

#[test]
fn an_edited_recorded_row_asks_only_its_chunk_again() {
    let mut bench = bench(RECORDING_ROWS);
    let first = bench.run(&Generate, replay()).unwrap();
    assert_eq!((first.rows.new, first.rows.remembered), (3, 0));
    bench.source(
        RECORDING,
        "exec/answers.jsonl",
        RECORDING_ROWS.replace("Owen keeps sales.", "Owen does.").as_bytes(),
    );
    let second = bench.run(&Generate, replay()).unwrap();
    assert_eq!((second.rows.new, second.rows.remembered), (1, 2));
}

#[test]
fn a_moved_chunk_is_remembered_and_an_edited_one_is_not() {
    let mut bench = bench(RECORDING_ROWS);
    bench.run(&Generate, replay()).unwrap();
    let mut moved = chunks();
    moved[1].id = "exec/notes/a.md@120".to_owned();
    moved[1].span = [120, 150];
    moved[2].text = "Nothing at all.".to_owned();
    let outcome = bench.table("chunks", "chunks.jsonl", &moved).run(&Generate, replay()).unwrap();
    assert_eq!((outcome.rows.new, outcome.rows.remembered), (1, 2));
    assert_eq!(examples(&outcome)[2].provenance.chunks, ["exec/notes/a.md@120"]);
}

#[test]
fn the_same_run_gives_the_same_bytes_whatever_the_concurrency() {
    let mut with = replay();
    with["concurrency"] = json!(1);
    let one = bench(RECORDING_ROWS).run(&Generate, with.clone()).unwrap().text("examples.jsonl");
    with["concurrency"] = json!(8);
    assert_eq!(one, bench(RECORDING_ROWS).run(&Generate, with).unwrap().text("examples.jsonl"));
}

#[test]
fn a_recording_of_other_notes_is_an_error_with_a_hint() {
    let rows = r#"{"source":"elsewhere.md","response":"{\"examples\":[]}"}"#;
    let error = bench(rows).run(&Generate, replay()).err().unwrap();
    assert_eq!(error.message, "no example from 3 chunks, of which 0 were answered");
    assert!(error.hint.unwrap().contains("`quote`"));
}

fn live(server: &Server) -> Value {
    json!({
        "provider": { "type": "openai", "base_url": server.base_url, "model": "m", "api_key_env": "PATH", "retries": 0 },
        "concurrency": 1,
    })
}

const GOOD: &str = r#"{"examples":[{"question":"Q?","answer":"An answer.","fact":"f"}]}"#;

#[test]
fn a_bad_live_answer_is_asked_once_more() {
    let server = Server::start(vec![completion("no json"), completion(GOOD)]);
    let outcome = bench("").run(&Generate, live(&server)).unwrap();
    assert_eq!(
        (outcome.count("examples"), outcome.count("rejected"), outcome.count("prompt_tokens")),
        (3, 0, 44)
    );
    assert!(server.sent()[1].contains("Your last reply could not be used"));
    assert_eq!(examples(&outcome)[0].provenance.generator, "openai:m");
}

#[test]
fn a_twice_bad_live_answer_is_one_rejected_row() {
    let bad = r#"{"examples":[{"question":"Q?"}]}"#;
    let server = Server::start(vec![completion(bad), completion(bad), completion(GOOD)]);
    let outcome = bench("").run(&Generate, live(&server)).unwrap();
    assert_eq!((outcome.count("examples"), outcome.count("rejected")), (2, 1));
    let rejected: Vec<Value> = outcome.table("rejected.jsonl");
    assert!(rejected[0]["reason"].as_str().unwrap().contains("answer"), "{rejected:?}");
}

#[test]
fn a_failure_keeps_what_was_answered_and_is_never_remembered() {
    let server = Server::start(vec![completion(GOOD), http("503 Service Unavailable", "", "busy")]);
    let mut bench = bench("");
    let error = bench.run(&Generate, live(&server)).err().unwrap();
    assert!(error.transient);
    assert!(error.message.starts_with("2 of 3 chunks have no answer"), "{}", error.message);
    assert!(error.hint.unwrap().contains("the 1 answered chunks are kept"));
    assert_eq!((bench.rows().new, bench.rows().failed), (1, 2));
    // The key names the address, so the second server must take over the first one's place: another memo row
    // set is asked only for what is missing when the server is the same.
    let after = server.sent().len();
    let again = bench.run(&Generate, live(&server)).err().unwrap();
    assert!(again.transient);
    assert_eq!(server.sent().len() - after, 2, "the answered chunk is not asked again");
}

#[test]
fn a_refused_key_stops_at_once() {
    let server = Server::start(vec![http("401 Unauthorized", "", "who are you")]);
    let error = bench("").run(&Generate, live(&server)).err().unwrap();
    assert!(!error.transient && error.hint.unwrap().contains("api_key_env"));
    assert_eq!(server.sent().len(), 1);
}

#[test]
fn the_key_is_in_no_output_and_no_memo() {
    let secret = std::env::var("PATH").unwrap();
    let server = Server::start(vec![completion(GOOD)]);
    let mut bench = bench("");
    let outcome = bench.run(&Generate, live(&server)).unwrap();
    assert!(server.sent()[0].contains(secret.trim()), "the key is used");
    let written = outcome.text("examples.jsonl") + &outcome.text("rejected.jsonl");
    assert!(!written.contains(secret.trim()));
    assert!(!String::from_utf8_lossy(&bench.services.memo_bytes()).contains(secret.trim()));
}

#[test]
fn a_stopped_stage_says_so() {
    let mut bench = bench(RECORDING_ROWS);
    bench.services.cancel();
    assert_eq!(bench.run(&Generate, replay()).err().unwrap().code, "run::cancelled");
}

#[test]
fn braces_in_a_note_are_no_places() {
    let chunks = chunks();
    let request = &requests(&chunks, &serde_json::from_value(replay()).unwrap())[1];
    assert!(request.user.contains("Owen keeps sales {chunk} and {n}."));
    assert!(request.user.contains("the note \"First week\", under \"First week\""));
    assert!(request.user.contains("up to 3 facts"));
}

#[test]
fn wrong_parameters_are_found_before_anything_runs() {
    let check = |with: Value, expected: &str| {
        let error = bench("").run(&Generate, with).err().unwrap();
        assert!(error.message.contains(expected), "{}", error.message);
    };
    check(json!({ "provider": { "type": "replay", "path": "a", "model": "m" } }), "provider");
    check(json!({ "provider": { "type": "magic" } }), "provider");
    check(
        json!({ "provider": { "type": "openai", "base_url": "localhost:80", "model": "m" } }),
        "neither http nor https",
    );
    check(
        json!({ "provider": { "type": "openai", "base_url": "http://me:pw@host", "model": "m" } }),
        "credentials",
    );
    let mut with = replay();
    with["prompt"] = json!("Ask three questions.");
    check(with, "`{chunk}`");
    let absent = json!({ "provider": { "type": "openai", "base_url": "http://127.0.0.1:9", "model": "m", "api_key_env": "TUNESMITH_TEST_ABSENT" } });
    check(absent, "`TUNESMITH_TEST_ABSENT`");
}
