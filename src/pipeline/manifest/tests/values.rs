//! Problems of words, parameters and shapes, as a user sees them.

use super::*;

#[test]
fn an_unknown_word_is_told_with_a_suggestion() {
    check(
        "stage:\n  a: { uses: ingest }\nname: x\n",
        &expect![[r#"
        manifest::unknown_key

          x unknown key `stage`
           ,-[m.yaml:1:1]
         1 | stage:
           : ^^^^^
           `----
          help: did you mean `stages`?

    "#]],
    );
    check(
        "stages:\n  a:\n    uses: ingest\n    wiht: { paths: [x] }\n",
        &expect![[r#"
        [a] manifest::missing_key

          x `paths` is missing
           ,-[m.yaml:2:3]
         2 |   a:
           :   ^
           `----
          help: it is a list: Files, folders or globs

        [a] manifest::unknown_key

          x unknown key `wiht`
           ,-[m.yaml:4:5]
         4 |     wiht: { paths: [x] }
           :     ^^^^
           `----
          help: did you mean `with`?

    "#]],
    );
    check(
        "sweep: { matrix: { rank: [8] } }\nstages: { r: { uses: report } }\n",
        &expect![[r#"
            manifest::missing_key

              x `objective` is missing
               ,-[m.yaml:1:1]
             1 | sweep: { matrix: { rank: [8] } }
               : ^^^^^
               `----
              help: it is a text: The metric that is compared, `stage.metric`: `answers.tuned.accuracy`

        "#]],
    );
}

#[test]
fn an_unknown_parameter_is_told_at_its_key() {
    check(
        "stages:\n  a:\n    uses: ingest\n    with:\n      paths: [notes]\n      follow-links: true\n      colour: 1\n",
        &expect![[r#"
            [a] manifest::unknown_key

              x unknown key `follow-links`
               ,-[m.yaml:6:7]
             6 |       follow-links: true
               :       ^^^^^^^^^^^^
               `----
              help: did you mean `follow_links`?

            [a] manifest::unknown_key

              x unknown key `colour`
               ,-[m.yaml:7:7]
             7 |       colour: 1
               :       ^^^^^^
               `----
              help: there are `paths`, `follow_links`

        "#]],
    );
}

#[test]
fn a_value_of_the_wrong_type_is_told_at_the_value() {
    check(
        r#"
stages:
  n: { uses: ingest, with: { paths: notes, follow_links: yes } }
  t:
    uses: train
    needs: { data: n, base: n }
    with:
      rank: abc
      dropout: "0.1"
      seed: 1.5
      labels: { a: one, b: 300 }
"#,
        &expect![[r#"
            [n] manifest::wrong_type

              x expected a list, found `"notes"`
               ,-[m.yaml:3:37]
             3 |   n: { uses: ingest, with: { paths: notes, follow_links: yes } }
               :                                     ^^^^^
               `----
              help: write a list: `[...]`

            [n] manifest::wrong_type

              x expected `true` or `false`, found `"yes"`
               ,-[m.yaml:3:58]
             3 |   n: { uses: ingest, with: { paths: notes, follow_links: yes } }
               :                                                          ^^^
               `----
              help: write `true`

            [t] manifest::wrong_type

              x expected an integer, found `"abc"`
               ,-[m.yaml:8:13]
             8 |       rank: abc
               :             ^^^
               `----

            [t] manifest::wrong_type

              x expected a number, found `"0.1"`
               ,-[m.yaml:9:16]
             9 |       dropout: "0.1"
               :                ^^^^^
               `----
              help: remove the quotes

            [t] manifest::wrong_type

              x expected an integer, found `1.5`
                ,-[m.yaml:10:13]
             10 |       seed: 1.5
                :             ^^^
                `----

            [t] manifest::wrong_type

              x expected an integer, found `"one"`
                ,-[m.yaml:11:20]
             11 |       labels: { a: one, b: 300 }
                :                    ^^^
                `----

            [t] manifest::out_of_range

              x expected at most `255`, found `300`
                ,-[m.yaml:11:28]
             11 |       labels: { a: one, b: 300 }
                :                            ^^^
                `----

        "#]],
    );
}

#[test]
fn a_number_out_of_range_is_told_with_the_bound() {
    check(
        r#"
stages:
  n: { uses: ingest, with: { paths: [] } }
  t:
    uses: train
    needs: { data: n, base: n }
    with: { rank: -1, dropout: 1.0, seed: -3, warmup: 99999999999999999999 }
"#,
        &expect![[r#"
            [n] manifest::out_of_range

              x expected at least 1 entry, found 0
               ,-[m.yaml:3:37]
             3 |   n: { uses: ingest, with: { paths: [] } }
               :                                     ^^
               `----

            [t] manifest::out_of_range

              x expected at least `1`, found `-1`
               ,-[m.yaml:7:19]
             7 |     with: { rank: -1, dropout: 1.0, seed: -3, warmup: 99999999999999999999 }
               :                   ^^
               `----

            [t] manifest::out_of_range

              x expected less than `1`, found `1.0`
               ,-[m.yaml:7:32]
             7 |     with: { rank: -1, dropout: 1.0, seed: -3, warmup: 99999999999999999999 }
               :                                ^^^
               `----

            [t] manifest::out_of_range

              x expected at least `0`, found `-3`
               ,-[m.yaml:7:43]
             7 |     with: { rank: -1, dropout: 1.0, seed: -3, warmup: 99999999999999999999 }
               :                                           ^^
               `----

            manifest::number

              x the number `99999999999999999999` is too large
               ,-[m.yaml:7:55]
             7 |     with: { rank: -1, dropout: 1.0, seed: -3, warmup: 99999999999999999999 }
               :                                                       ^^^^^^^^^^^^^^^^^^^^
               `----

        "#]],
    );
}

#[test]
fn a_choice_is_told_with_all_choices() {
    check(
        r#"
stages:
  n: { uses: ingest, with: { paths: [x] } }
  t:
    uses: train
    needs: { data: n, base: n }
    with:
      rank: 8
      schedule: cosin
      targets: atention
      stop: { when: plateu, patience: 2 }
  u:
    uses: train
    needs: { data: n, base: n }
    with:
      rank: 8
      schedule: 3
      targets: 7
      stop: { patience: 2 }
  v:
    uses: train
    needs: { data: n, base: n }
    with:
      rank: 8
      stop: { when: loss, belo: 2 }
"#,
        &expect![[r#"
            [t] manifest::not_one_of

              x expected one of `linear`, `cosine`, found `"cosin"`
               ,-[m.yaml:9:17]
             9 |       schedule: cosin
               :                 ^^^^^
               `----
              help: did you mean `cosine`?

            [t] manifest::not_one_of

              x expected one of `auto`, `attention`, found `"atention"`
                ,-[m.yaml:10:16]
             10 |       targets: atention
                :                ^^^^^^^^
                `----
              help: did you mean `attention`?

            [t] manifest::not_one_of

              x expected one of `plateau`, `loss`, found `"plateu"`
                ,-[m.yaml:11:21]
             11 |       stop: { when: plateu, patience: 2 }
                :                     ^^^^^^
                `----
              help: did you mean `plateau`?

            [u] manifest::wrong_type

              x expected `linear` or `cosine`, found `3`
                ,-[m.yaml:17:17]
             17 |       schedule: 3
                :                 ^
                `----

            [u] manifest::wrong_type

              x expected one of `auto`, `attention` or a list, found `7`
                ,-[m.yaml:18:16]
             18 |       targets: 7
                :                ^
                `----
              help: write a list: `[...]`

            [u] manifest::missing_key

              x `when` is missing
                ,-[m.yaml:19:7]
             19 |       stop: { patience: 2 }
                :       ^^^^
                `----
              help: it is one of `plateau`, `loss`

            [v] manifest::missing_key

              x `below` is missing
                ,-[m.yaml:25:7]
             25 |       stop: { when: loss, belo: 2 }
                :       ^^^^
                `----
              help: it is a number

            [v] manifest::unknown_key

              x unknown key `belo`
                ,-[m.yaml:25:27]
             25 |       stop: { when: loss, belo: 2 }
                :                           ^^^^
                `----
              help: did you mean `below`?

        "#]],
    );
}

#[test]
fn a_missing_parameter_is_told_at_the_stage_or_at_with() {
    check(
        "stages:\n  a: { uses: ingest }\n  b: { uses: ingest, with: {} }\n  c: { with: { paths: [x] } }\n",
        &expect![[r#"
            [a] manifest::missing_key

              x `paths` is missing
               ,-[m.yaml:2:3]
             2 |   a: { uses: ingest }
               :   ^
               `----
              help: it is a list: Files, folders or globs

            [b] manifest::missing_key

              x `paths` is missing
               ,-[m.yaml:3:22]
             3 |   b: { uses: ingest, with: {} }
               :                      ^^^^
               `----
              help: it is a list: Files, folders or globs

            [c] manifest::missing_key

              x stage `c` does not say what it is
               ,-[m.yaml:4:3]
             4 |   c: { with: { paths: [x] } }
               :   ^
               `----
              help: add `uses`, the kind of the stage

        "#]],
    );
}

#[test]
fn what_the_kind_itself_refuses_is_told_at_the_parameter() {
    check(
        r#"
stages:
  n: { uses: ingest, with: { paths: [x] } }
  t: { uses: train, needs: { data: n, base: n }, with: { rank: 8, warmup: 3, epochs: 2 } }
"#,
        &expect![[r#"
            [t] manifest::param

              x warmup of `3` epochs leaves none of `2` to train
               ,-[m.yaml:4:75]
             4 |   t: { uses: train, needs: { data: n, base: n }, with: { rank: 8, warmup: 3, epochs: 2 } }
               :                                                                           ^
               `----
              help: make it smaller than `epochs`

        "#]],
    );
}

#[test]
fn names_and_shapes_are_checked() {
    check(
        r#"
name: ../evil
params: [1]
profiles: { p: 3 }
stages:
  "a b": { uses: report }
  c: 3
  d: { uses: [report] }
  e: { uses: ingest, with: 3 }
"#,
        &expect![[r#"
            manifest::bad_name

              x `../evil` cannot be a name
               ,-[m.yaml:2:7]
             2 | name: ../evil
               :       ^^^^^^^
               `----
              help: use letters, digits, `-` and `_`, at most 100 of them

            manifest::wrong_type

              x `params` has to be a map, found a list
               ,-[m.yaml:3:9]
             3 | params: [1]
               :         ^^^
               `----

            manifest::wrong_type

              x profile `p` has to be a map, found `3`
               ,-[m.yaml:4:16]
             4 | profiles: { p: 3 }
               :                ^
               `----

            manifest::bad_name

              x `a b` cannot be a name
               ,-[m.yaml:6:3]
             6 |   "a b": { uses: report }
               :   ^^^^^
               `----
              help: use letters, digits, `-` and `_`, at most 100 of them

            manifest::wrong_type

              x stage `c` has to be a map, found `3`
               ,-[m.yaml:7:6]
             7 |   c: 3
               :      ^
               `----

            [d] manifest::wrong_type

              x `uses` is the kind of the stage, found a list
               ,-[m.yaml:8:14]
             8 |   d: { uses: [report] }
               :              ^^^^^^^^
               `----

            [e] manifest::wrong_type

              x `with` has to be a map, found `3`
               ,-[m.yaml:9:28]
             9 |   e: { uses: ingest, with: 3 }
               :                            ^
               `----

        "#]],
    );
    check(
        "",
        &expect![[r#"
        manifest::missing_key

          x the manifest has no stages
          help: add `stages`, a map from name to `{ uses: <kind> }`

    "#]],
    );
    check(
        "- a\n",
        &expect![[r#"
        manifest::wrong_type

          x a manifest has to be a map, found a list
           ,-[m.yaml:1:1]
         1 | - a
           : ^^^
           `----

    "#]],
    );
}

#[test]
fn many_warnings_leave_room_for_errors() {
    let params: String = (0..200).map(|index| format!("  k{index}: 1\n")).collect();
    let manifest = format!("params:\n{params}stages: {{ r: {{ uses: reprt }} }}\n");
    let folder = folder(&[("m.yaml", &manifest)]);
    let errors = load(&folder.path().join("m.yaml"), &Overrides::default(), KINDS).err().unwrap();
    let codes: Vec<_> = errors.problems.iter().map(|problem| problem.code).collect();
    assert_eq!(codes, ["manifest::unknown_kind"]);
}
