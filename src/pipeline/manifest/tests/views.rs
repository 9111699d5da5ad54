//! What is derived from a manifest: places, pictures, and the schema for editors.

use super::meaning::YAML;
use super::*;

#[test]
fn places_point_into_the_file() {
    let loaded = load_files(&[("m.yaml", YAML)], &Overrides::default()).ok().unwrap();
    let adapter = loaded.pipeline.find("adapter").unwrap();
    let places: Vec<String> = adapter
        .places
        .iter()
        .map(|(path, place)| format!("{path:?} {}:{}", place.line, place.column))
        .collect();
    expect![[r#"
        "" 19:3
        "extra" 29:7
        "extra.list" 29:16
        "extra.list.0" 29:23
        "extra.list.1" 29:26
        "extra.list.2" 29:31
        "extra.list.3" 29:37
        "extra.text" 29:49
        "learning_rate" 24:22
        "needs" 21:5
        "needs.base" 21:33
        "needs.data" 21:20
        "rank" 23:13
        "schedule" 26:17
        "seed" 25:13
        "stop" 28:7
        "stop.patience" 28:40
        "stop.when" 28:21
        "targets" 27:7
        "targets.0" 27:17
        "targets.1" 27:20
        "uses" 20:11"#]]
    .assert_eq(&places.join("\n"));
    assert_eq!(adapter.place("targets.7"), adapter.places.get("targets"));
    assert_eq!(adapter.place("nowhere"), adapter.places.get(""));
}

#[test]
fn pictures_show_stages_and_slots() {
    let loaded = load_files(&[("m.yaml", YAML)], &Overrides::default()).ok().unwrap();
    let pipeline = loaded.pipeline;
    expect![[r#"
        notes    ingest
        base     ingest
        adapter  train   <- data: notes, base
        report   report  <- adapter, notes

        digraph "demo" {
          rankdir=LR;
          node [shape=box];
          "notes" [label="notes\ningest"];
          "base" [label="base\ningest"];
          "adapter" [label="adapter\ntrain"];
          "report" [label="report\nreport"];
          "notes" -> "adapter" [label="data"];
          "base" -> "adapter";
          "adapter" -> "report";
          "notes" -> "report";
        }

        flowchart LR
          s0["notes<br/>ingest"]
          s1["base<br/>ingest"]
          s2["adapter<br/>train"]
          s3["report<br/>report"]
          s0 -->|"data"| s2
          s1 --> s2
          s2 --> s3
          s0 --> s3
    "#]]
    .assert_eq(&format!("{}\n{}\n{}", pipeline.to_text(), pipeline.to_dot(), pipeline.to_mermaid()));
}

#[test]
fn the_editor_schema_covers_every_kind_and_allows_references() {
    let schema = json_schema(KINDS);
    assert_eq!(schema["$defs"]["stage"]["allOf"].as_array().unwrap().len(), KINDS.len());
    expect![[r##"
        {
          "rank": {
            "description": "Rank of the adapter.",
            "anyOf": [
              {
                "type": "integer",
                "format": "uint32",
                "minimum": 1,
                "maximum": 512
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "dropout": {
            "default": 0.0,
            "anyOf": [
              {
                "type": "number",
                "format": "double",
                "minimum": 0.0,
                "exclusiveMaximum": 1.0
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "learning_rate": {
            "anyOf": [
              {
                "type": [
                  "number",
                  "null"
                ],
                "format": "double"
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "seed": {
            "anyOf": [
              {
                "type": [
                  "integer",
                  "null"
                ],
                "format": "uint64",
                "minimum": 0
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "schedule": {
            "anyOf": [
              {
                "anyOf": [
                  {
                    "$ref": "#/$defs/train.Schedule"
                  },
                  {
                    "type": "null"
                  }
                ]
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "targets": {
            "anyOf": [
              {
                "anyOf": [
                  {
                    "$ref": "#/$defs/train.Targets"
                  },
                  {
                    "type": "null"
                  }
                ]
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "stop": {
            "anyOf": [
              {
                "anyOf": [
                  {
                    "$ref": "#/$defs/train.Stop"
                  },
                  {
                    "type": "null"
                  }
                ]
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "extra": true,
          "labels": {
            "anyOf": [
              {
                "type": [
                  "object",
                  "null"
                ],
                "additionalProperties": {
                  "anyOf": [
                    {
                      "type": "integer",
                      "format": "uint8",
                      "minimum": 0,
                      "maximum": 255
                    },
                    {
                      "$ref": "#/$defs/reference"
                    }
                  ]
                }
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "warmup": {
            "anyOf": [
              {
                "type": [
                  "integer",
                  "null"
                ],
                "format": "uint",
                "minimum": 0
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          },
          "epochs": {
            "anyOf": [
              {
                "type": [
                  "integer",
                  "null"
                ],
                "format": "uint",
                "minimum": 0
              },
              {
                "$ref": "#/$defs/reference"
              }
            ]
          }
        }"##]]
    .assert_eq(&serde_json::to_string_pretty(&schema["$defs"]["train"]["properties"]).unwrap());
    expect![[r##"
        {
          "if": {
            "properties": {
              "uses": {
                "const": "train"
              }
            },
            "required": [
              "uses"
            ]
          },
          "then": {
            "properties": {
              "with": {
                "anyOf": [
                  {
                    "$ref": "#/$defs/train"
                  },
                  {
                    "$ref": "#/$defs/reference"
                  }
                ]
              },
              "needs": {
                "type": [
                  "string",
                  "array",
                  "object"
                ],
                "items": {
                  "type": "string"
                },
                "properties": {
                  "data": {
                    "description": "A table.",
                    "type": [
                      "string",
                      "array"
                    ]
                  },
                  "base": {
                    "description": "A table.",
                    "type": [
                      "string",
                      "array"
                    ]
                  },
                  "previous": {
                    "description": "A table.",
                    "type": [
                      "string",
                      "array"
                    ]
                  }
                },
                "additionalProperties": false
              }
            },
            "required": [
              "with",
              "needs"
            ]
          }
        }"##]]
    .assert_eq(&serde_json::to_string_pretty(&schema["$defs"]["stage"]["allOf"][2]).unwrap());
    // Every reference leads somewhere.
    let text = schema.to_string();
    for (index, _) in text.match_indices("\"$ref\":\"#") {
        let pointer = text[index + 9..].split('"').next().unwrap();
        assert!(schema.pointer(pointer).is_some(), "{pointer}");
    }
}
