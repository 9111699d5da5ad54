# Everyday commands; `just --list` shows them.

# Run the main pipeline.
run *ARGS:
    cargo run --release -- run pipelines/exec-assistant.yaml {{ARGS}}

# The whole test suite, as the README has it.
test:
    sh tests/ptxsim/fetch-nvrtc.sh
    cargo test --release

# Format and lint as CI does.
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Write docs/stages.md from the stage kinds.
docs:
    cargo run --release -- schema --markdown > docs/stages.md

# All that CI does.
ci:
    bash .ci/run

# The engine's library tests on an emulated CPU with AVX-512 and AMX (tests/emulated/README.md).
test-emulated *ARGS:
    bash tests/emulated/run.sh {{ARGS}}

# The tests of the device on a GPU, instead of in the interpreter of PTX.
test-gpu:
    if nvidia-smi -L >/dev/null 2>&1; then TUNESMITH_TEST_GPU=1 cargo test --release -p tunesmith-engine --lib -- conformance tests::device; else echo "skipped: no CUDA device"; fi
