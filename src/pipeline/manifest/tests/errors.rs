//! Every kind of problem, as a user sees it.

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
        manifest::unknown_key

          x unknown key `sweep`
           ,-[m.yaml:1:1]
         1 | sweep: { matrix: { rank: [8] } }
           : ^^^^^
           `----
          help: there are `name`, `description`, `params`, `profiles`, `include`, `stages`

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
fn an_unknown_kind_or_stage_is_told_with_the_nearest_one() {
    check(
        r#"
stages:
  notes: { uses: injest, with: { paths: [x] } }
  chunks: { uses: chunk, needs: note }
"#,
        &expect![[r#"
            [notes] manifest::unknown_kind

              x no kind of stage is called `injest`
               ,-[m.yaml:3:18]
             3 |   notes: { uses: injest, with: { paths: [x] } }
               :                  ^^^^^^
               `----
              help: did you mean `ingest`?

            [chunks] manifest::unknown_stage

              x no stage `note`
               ,-[m.yaml:4:33]
             4 |   chunks: { uses: chunk, needs: note }
               :                                 ^^^^
               `----
              help: did you mean `notes`?

        "#]],
    );
}

#[test]
fn needs_that_cannot_be_placed_show_the_map_to_write() {
    check(
        r#"
stages:
  split: { uses: ingest, with: { paths: [x] } }
  model: { uses: ingest, with: { paths: [x] } }
  data: { uses: ingest, with: { paths: [x] } }
  t: { uses: train, needs: [split, model], with: { rank: 8 } }
  u: { uses: train, needs: [data], with: { rank: 8 } }
  v: { uses: train, needs: { data: data, bass: model }, with: { rank: 8 } }
  w: { uses: train, with: { rank: 8 } }
  c: { uses: chunk, needs: [split, model] }
  i: { uses: ingest, needs: split, with: { paths: [x] } }
  r: { uses: report, needs: [data, data] }
  s: { uses: report, needs: [data, 3] }
  x: { uses: report, needs: { ../up: data } }
"#,
        &expect![[r#"
            [t] manifest::needs

              x it is not clear which input of `train` each of these fills
               ,-[m.yaml:6:28]
             6 |   t: { uses: train, needs: [split, model], with: { rank: 8 } }
               :                            ^^^^^^^^^^^^^^
               `----
              help: say it: `needs: { data: split, base: model }`

            [u] manifest::needs

              x it is not clear which input of `train` each of these fills
               ,-[m.yaml:7:28]
             7 |   u: { uses: train, needs: [data], with: { rank: 8 } }
               :                            ^^^^^^
               `----
              help: say it: `needs: { data: data, base: <stage> }`

            [v] manifest::missing_need

              x input `base` of `train` is missing
               ,-[m.yaml:8:21]
             8 |   v: { uses: train, needs: { data: data, bass: model }, with: { rank: 8 } }
               :                     ^^^^^
               `----
              help: add `base: <stage>` to `needs`: A table

            [v] manifest::unknown_slot

              x `train` has no input `bass`
               ,-[m.yaml:8:42]
             8 |   v: { uses: train, needs: { data: data, bass: model }, with: { rank: 8 } }
               :                                          ^^^^
               `----
              help: did you mean `base`?

            [w] manifest::missing_need

              x input `data` of `train` is missing
               ,-[m.yaml:9:3]
             9 |   w: { uses: train, with: { rank: 8 } }
               :   ^
               `----
              help: add `data: <stage>` to `needs`: A table

            [w] manifest::missing_need

              x input `base` of `train` is missing
               ,-[m.yaml:9:3]
             9 |   w: { uses: train, with: { rank: 8 } }
               :   ^
               `----
              help: add `base: <stage>` to `needs`: A table

            [c] manifest::needs

              x `chunk` takes one input, `documents`, found 2
                ,-[m.yaml:10:28]
             10 |   c: { uses: chunk, needs: [split, model] }
                :                            ^^^^^^^^^^^^^^
                `----

            [i] manifest::unknown_slot

              x `ingest` takes no input
                ,-[m.yaml:11:29]
             11 |   i: { uses: ingest, needs: split, with: { paths: [x] } }
                :                             ^^^^^
                `----
              help: remove `needs`

            [r] manifest::needs

              x two inputs are called `data`
                ,-[m.yaml:12:36]
             12 |   r: { uses: report, needs: [data, data] }
                :                                    ^^^^
                `----
              help: write `needs` as a map and give each its own name

            [s] manifest::wrong_type

              x `needs` names stages, found `3`
                ,-[m.yaml:13:36]
             13 |   s: { uses: report, needs: [data, 3] }
                :                                    ^
                `----
              help: write a stage's name, a list of names, or a map from input to name

            [x] manifest::bad_name

              x `../up` cannot be the name of an input
                ,-[m.yaml:14:31]
             14 |   x: { uses: report, needs: { ../up: data } }
                :                               ^^^^^
                `----
              help: use letters, digits, `-` and `_`, at most 100 of them

        "#]],
    );
}

#[test]
fn a_cycle_shows_its_path() {
    check(
        r#"
stages:
  a: { uses: chunk, needs: c }
  b: { uses: chunk, needs: a }
  c: { uses: chunk, needs: b }
  d: { uses: chunk, needs: d }
  e: { uses: chunk, needs: d }
"#,
        &expect![[r#"
            [a] manifest::cycle

              x stages need each other in a circle: `a -> c -> b -> a`
               ,-[m.yaml:3:28]
             3 |   a: { uses: chunk, needs: c }
               :                            ^
               `----
              help: take one of these needs away

            [d] manifest::cycle

              x stages need each other in a circle: `d -> d`
               ,-[m.yaml:6:28]
             6 |   d: { uses: chunk, needs: d }
               :                            ^
               `----
              help: take one of these needs away

        "#]],
    );
}

#[test]
fn a_bad_reference_is_told_where_it_is_used() {
    check(
        r#"
params:
  rank: 8
  train: { seed: 7 }
stages:
  n:
    uses: ingest
    with:
      paths:
        - ${params.rnk}
        - "a ${params.train} b"
        - ${params.train.sed}
        - ${params.rank.x}
        - ${env.TUNESMITH_SURELY_NOT_SET}
        - ${stages.a.metrics.loss}
        - ${HOME}
        - ${params.rank
"#,
        &expect![[r#"
            manifest::unknown_param

              x no param `rnk`
                ,-[m.yaml:10:11]
             10 |         - ${params.rnk}
                :           ^^^^^^^^^^^^^
                `----
              help: did you mean `rank`?

            manifest::interpolation

              x `${params.train}` is a map, which cannot be put into a text
                ,-[m.yaml:11:14]
             11 |         - "a ${params.train} b"
                :              ^^^^^^^^^^^^^^^
                `----
              help: let the reference be the whole value, or refer to a part of it

            manifest::unknown_param

              x no param `train.sed`
                ,-[m.yaml:12:11]
             12 |         - ${params.train.sed}
                :           ^^^^^^^^^^^^^^^^^^^
                `----
              help: did you mean `seed`?

            manifest::unknown_param

              x param `rank` is `8`, not a map with `x`
                ,-[m.yaml:13:11]
             13 |         - ${params.rank.x}
                :           ^^^^^^^^^^^^^^^^
                `----

            manifest::unknown_env

              x the environment variable `TUNESMITH_SURELY_NOT_SET` is not set
                ,-[m.yaml:14:11]
             14 |         - ${env.TUNESMITH_SURELY_NOT_SET}
                :           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
                `----

            manifest::interpolation

              x what another stage made cannot be used in a manifest
                ,-[m.yaml:15:11]
             15 |         - ${stages.a.metrics.loss}
                :           ^^^^^^^^^^^^^^^^^^^^^^^^
                `----
              help: pass results along with `needs`

            manifest::interpolation

              x `${HOME}` refers to nothing
                ,-[m.yaml:16:11]
             16 |         - ${HOME}
                :           ^^^^^^^
                `----
              help: write `${params.name}` or `${env.NAME}`, or `$${HOME}` for a plain text

            manifest::interpolation

              x `${` is not closed
                ,-[m.yaml:17:11]
             17 |         - ${params.rank
                :           ^^^^^^^^^^^^^
                `----
              help: close it with `}`, or write `$${` for a plain `${`

        "#]],
    );
}

#[test]
fn a_wrong_value_from_a_param_says_where_it_comes_from() {
    check(
        r#"
params: { rank: abc }
stages:
  n: { uses: ingest, with: { paths: [x] } }
  t: { uses: train, needs: { data: n, base: n }, with: { rank: "${params.rank}" } }
"#,
        &expect![[r#"
            [t] manifest::wrong_type

              x expected an integer, found `"abc"`
               ,-[m.yaml:5:64]
             5 |   t: { uses: train, needs: { data: n, base: n }, with: { rank: "${params.rank}" } }
               :                                                                ^^^^^^^^^^^^^^^^
               `----
              help: it comes from `${params.rank}`

        "#]],
    );
}

#[test]
fn params_in_a_circle_show_their_path() {
    check(
        r#"
params: { a: "${params.b}", b: "x${params.c.d}", c: { d: "${params.a}" } }
stages:
  n: { uses: ingest, with: { paths: ["${params.a}"] } }
"#,
        &expect![[r#"
            manifest::param_cycle

              x params refer to each other in a circle: `a -> b -> c.d -> a`
               ,-[m.yaml:2:59]
             2 | params: { a: "${params.b}", b: "x${params.c.d}", c: { d: "${params.a}" } }
               :                                                           ^^^^^^^^^^^
               `----

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
fn overrides_of_nothing_are_told_on_the_command_line() {
    let overrides = Overrides {
        profile: Some("fulll".to_owned()),
        set: vec![
            ("rnk".to_owned(), "3".to_owned()),
            ("train.sed".to_owned(), "3".to_owned()),
            ("rank.x".to_owned(), "3".to_owned()),
            ("rank".to_owned(), "[1".to_owned()),
        ],
        params_files: vec!["p.json".into(), "none.toml".into()],
    };
    let manifest = r#"
params: { rank: 1, train: { seed: 1 } }
profiles: { full: { rak: 2 } }
stages: { r: { uses: report } }
"#;
    check_files(
        &[("m.yaml", manifest), ("p.json", "{\n\t\"ranks\": 2\n}")],
        &overrides,
        &expect![[r#"
        manifest::unknown_param

          x no param `rak` to override
           ,-[m.yaml:3:21]
         3 | profiles: { full: { rak: 2 } }
           :                     ^^^
           `----
          help: did you mean `rank`?

        manifest::unknown_profile

          x no profile `fulll`
           ,-[command line:1:11]
         1 | --profile fulll
           :           ^^^^^
           `----
          help: did you mean `full`?

        manifest::unknown_param

          x no param `ranks` to override
           ,-[p.json:2:2]
         2 |     "ranks": 2
           :     ^^^^^^^
           `----
          help: did you mean `rank`?

        manifest::unreadable

          x cannot read `none.toml`: there is no such file

        manifest::unknown_param

          x no param `rnk` to override
           ,-[command line:1:7]
         1 | --set rnk=3
           :       ^^^
           `----
          help: did you mean `rank`?

        manifest::unknown_param

          x no param `sed` to override
           ,-[command line:1:13]
         1 | --set train.sed=3
           :             ^^^
           `----
          help: did you mean `seed`?

        manifest::unknown_param

          x param `rank` is not a map, so nothing in it can be set
           ,-[command line:1:7]
         1 | --set rank.x=3
           :       ^^^^
           `----

        manifest::syntax

          x unclosed bracket '['
           ,-[command line:1:12]
         1 | --set rank=[1
           :            ^
           `----

    "#]],
    );
}

#[test]
fn includes_that_fail_are_told_where_they_are_asked_for() {
    check_files(
        &[
            ("m.yaml", "include: [sub/a.yaml, none.yaml, sub]\nstages: { r: { uses: report } }\n"),
            ("sub/a.yaml", "include: b.toml\n"),
            ("sub/b.toml", "include = '../m.yaml'\n"),
        ],
        &Overrides::default(),
        &expect![[r#"
            manifest::unreadable

              x cannot read `none.yaml`: there is no such file
               ,-[m.yaml:1:23]
             1 | include: [sub/a.yaml, none.yaml, sub]
               :                       ^^^^^^^^^
               `----

            manifest::unreadable

              x cannot read `sub`: it is a folder
               ,-[m.yaml:1:34]
             1 | include: [sub/a.yaml, none.yaml, sub]
               :                                  ^^^
               `----

            manifest::include_cycle

              x files include each other: `m.yaml -> sub/a.yaml -> sub/b.toml -> sub/../m.yaml`
               ,-[sub/b.toml:1:11]
             1 | include = '../m.yaml'
               :           ^^^^^^^^^^^
               `----

        "#]],
    );
}

#[test]
fn the_syntax_errors_of_all_files_are_told_at_once() {
    check_files(
        &[
            ("m.yaml", "include: [a.toml, b.yaml, c.yaml]\nstages:\n\ta: { uses: ingest }\n"),
            ("a.toml", "name = \n"),
        ],
        &Overrides::default(),
        &expect![[r#"
            manifest::syntax

              x tabs disallowed within this context (block indentation)
               ,-[m.yaml:3:2]
             3 |     a: { uses: ingest }
               :     ^
               `----
              help: indent with spaces; YAML does not allow tabs there

        "#]],
    );
    check_files(
        &[
            ("m.yaml", "include: [a.toml, b.yaml, c.yaml]\nstage: {}\n"),
            ("a.toml", "name = \n[params]\nx = 1\nx = 2\n"),
            ("b.yaml", "stages: { a: { uses: ingest\n"),
            ("c.yaml", "params: { a: @x }\n"),
        ],
        &Overrides::default(),
        &expect![[r#"
            manifest::unknown_key

              x unknown key `stage`
               ,-[m.yaml:2:1]
             2 | stage: {}
               : ^^^^^
               `----
              help: did you mean `stages`?

            manifest::syntax

              x string values must be quoted, expected literal string
               ,-[a.toml:1:8]
             1 | name =
               :        ^
               `----

            manifest::duplicate_key

              x duplicate key
               ,-[a.toml:4:1]
             4 | x = 2
               : ^
               `----

            manifest::syntax

              x unclosed bracket '{'
               ,-[b.yaml:1:14]
             1 | stages: { a: { uses: ingest
               :              ^
               `----

            manifest::syntax

              x unexpected character: `@'
               ,-[c.yaml:1:14]
             1 | params: { a: @x }
               :              ^
               `----
              help: a value that starts with this character needs quotes

        "#]],
    );
}

#[test]
fn yaml_that_surprises_is_refused() {
    check(
        "params: { a: 1, b: 2, a: 3 }\nstages:\n  r: { uses: report }\n  r: { uses: report }\n",
        &expect![[r#"
            manifest::duplicate_key

              x key `a` stands twice in one map
               ,-[m.yaml:1:23]
             1 | params: { a: 1, b: 2, a: 3 }
               :                       ^
               `----

            manifest::duplicate_key

              x key `r` stands twice in one map
               ,-[m.yaml:4:3]
             4 |   r: { uses: report }
               :   ^
               `----

        "#]],
    );
    check(
        "params: { a: !!str 1, b: .nan, c: 0x1ffffffffffffffffff }\nstages: { r: { uses: report } }\n",
        &expect![[r#"
            manifest::syntax

              x tags such as `!!str` have no meaning here
               ,-[m.yaml:1:20]
             1 | params: { a: !!str 1, b: .nan, c: 0x1ffffffffffffffffff }
               :                    ^
               `----
              help: leave the tag out; quote the value if it is a text

            manifest::number

              x `.nan` is not a finite number
               ,-[m.yaml:1:26]
             1 | params: { a: !!str 1, b: .nan, c: 0x1ffffffffffffffffff }
               :                          ^^^^
               `----

            manifest::number

              x the number `0x1ffffffffffffffffff` is too large
               ,-[m.yaml:1:35]
             1 | params: { a: !!str 1, b: .nan, c: 0x1ffffffffffffffffff }
               :                                   ^^^^^^^^^^^^^^^^^^^^^
               `----

        "#]],
    );
    check(
        "a: &a { x: 1 }\nb: { <<: *a }\n",
        &expect![[r#"
        manifest::syntax

          x merge keys (`<<`) are not supported
           ,-[m.yaml:2:6]
         2 | b: { <<: *a }
           :      ^^
           `----
          help: write the keys out, or keep what is shared in `params`

    "#]],
    );
    check(
        "? [a, b]\n: 1\n",
        &expect![[r#"
        manifest::syntax

          x a key has to be a plain text
           ,-[m.yaml:1:3]
         1 | ? [a, b]
           :   ^
           `----

    "#]],
    );
    check(
        "stages: {}\n---\nstages: {}\n",
        &expect![[r#"
        manifest::syntax

          x a second YAML document starts here
           ,-[m.yaml:2:1]
         2 | ---
           : ^^^
           `----
          help: put it in a file of its own

    "#]],
    );
}

#[test]
fn toml_problems_are_located_too() {
    check_files(
        &[(
            "m.toml",
            "[params]\nrank = 3\n\n[stages.notes]\nuses = 'ingest'\n[stages.notes.with]\npath = ['x']\n\n[stages.t]\nuses = \"train\"\nneeds = { data = \"notes\", base = \"note\" }\nwith.rank = \"a${params.rank}\"\nwith.dropout = -0.5\nwith.seed = 99999999999999999999\n",
        )],
        &Overrides::default(),
        &expect![[r#"
            [notes] manifest::missing_key

              x `paths` is missing
               ,-[m.toml:6:15]
             6 | [stages.notes.with]
               :               ^^^^
               `----
              help: it is a list: Files, folders or globs

            [notes] manifest::unknown_key

              x unknown key `path`
               ,-[m.toml:7:1]
             7 | path = ['x']
               : ^^^^
               `----
              help: did you mean `paths`?

            [t] manifest::unknown_stage

              x no stage `note`
                ,-[m.toml:11:34]
             11 | needs = { data = "notes", base = "note" }
                :                                  ^^^^^^
                `----
              help: did you mean `notes`?

            [t] manifest::wrong_type

              x expected an integer, found `"a3"`
                ,-[m.toml:12:13]
             12 | with.rank = "a${params.rank}"
                :             ^^^^^^^^^^^^^^^^^
                `----
              help: it comes from `a${params.rank}`

            [t] manifest::out_of_range

              x expected at least `0`, found `-0.5`
                ,-[m.toml:13:16]
             13 | with.dropout = -0.5
                :                ^^^^
                `----

            manifest::number

              x the number `99999999999999999999` is too large
                ,-[m.toml:14:13]
             14 | with.seed = 99999999999999999999
                :             ^^^^^^^^^^^^^^^^^^^^
                `----

        "#]],
    );
}

#[test]
fn a_lone_problem_reads_as_one_line() {
    let folder = folder(&[("m.yaml", "stages: { r: { uses: reprt } }\n")]);
    let path = folder.path().join("m.yaml");
    let errors = load(&path, &Overrides::default(), KINDS).err().unwrap();
    assert_eq!(errors.to_string(), format!("{}:1:22: no kind of stage is called `reprt`", path.display()));
}
