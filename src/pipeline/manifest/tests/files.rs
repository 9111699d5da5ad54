//! Problems of files and of the command line, as a user sees them.

use super::*;

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
