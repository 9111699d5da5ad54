//! Problems of what refers to something else: kinds, needs, params; as a user sees them.

use super::*;

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
