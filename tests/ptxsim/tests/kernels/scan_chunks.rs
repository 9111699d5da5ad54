//! `scan_chunks.cu` and `scan_gradients.cu` against the same loops in f64 as `scan.cu`.

use ptxsim::{Arg, Counts, Device, Fault, Launch, Module};

use super::orders::{in_both_orders, is_unordered};
use super::scan_case::Case;
use super::spans::{tiles, words};
use crate::harness::{download, download_bf16, kernels, planted, upload, upload_bf16};

/// Rows of a chunk.
const CHUNK: usize = 64;

/// A case on the device.
struct Placed<'a> {
    case: &'a Case,
    x: u64,
    b: u64,
    c: u64,
    dt: u64,
    dt_bias: u64,
    rate: u64,
    skip: u64,
    spans: u64,
    tiles: u64,
    span_tiles: u64,
    chunks: usize,
    steps: u64,
    sums: u64,
    /// What is launched instead, with a mistake.
    planted: Option<&'static Module>,
    /// What each launch cost, by name.
    costs: Vec<(String, Counts)>,
}

impl<'a> Placed<'a> {
    fn new(device: &mut Device, case: &'a Case) -> Self {
        let tiles = tiles(&case.spans, CHUNK);
        let mut span_tiles = vec![0];
        for span in &case.spans {
            span_tiles.push(span_tiles[span_tiles.len() - 1] + span.len().div_ceil(CHUNK) as i32);
        }
        let [x, b, c, dt] = [&case.x, &case.b, &case.c, &case.dt].map(|values| upload_bf16(device, values));
        let [dt_bias, rate, skip] =
            [&case.dt_bias, &case.rate, &case.skip].map(|values| upload(device, values));
        let [steps, sums] = [0; 2].map(|_| device.allocate(case.dt.len() * 4));
        Self {
            case,
            x,
            b,
            c,
            dt,
            dt_bias,
            rate,
            skip,
            spans: upload(device, &words(&case.spans)),
            chunks: tiles.len() / 2,
            tiles: upload(device, &tiles),
            span_tiles: upload(device, &span_tiles),
            steps,
            sums,
            planted: None,
            costs: Vec::new(),
        }
    }

    fn launch(
        &mut self,
        device: &mut Device,
        name: &str,
        grid: [usize; 3],
        (block, shared): (u32, u32),
        pointers: &[u64],
        rest: &[Arg],
    ) -> Result<(), Fault> {
        let arguments: Vec<Arg> =
            pointers.iter().copied().map(Arg::Pointer).chain(rest.iter().copied()).collect();
        let launch = Launch { grid: grid.map(|size| size as u32), block: [block, 1, 1], shared };
        let gradients = name.starts_with("scan_gradients") || name == "scan_sum_parts";
        let file = if gradients { "scan_gradients.cu" } else { "scan_chunks.cu" };
        let counts =
            device.launch(self.planted.unwrap_or_else(|| kernels(file)), name, &launch, &arguments)?;
        self.costs.push((name.to_owned(), counts));
        Ok(())
    }

    /// The entry of `name` for this many states.
    fn sized(&self, name: &str) -> String {
        format!("{name}_{}", self.case.states.next_power_of_two().max(64))
    }

    fn sizes(&self) -> Vec<Arg> {
        let case = self.case;
        [case.heads, case.head_dim, case.groups, case.states].map(|size| Arg::I32(size as i32)).to_vec()
    }

    fn parts(&self) -> usize {
        self.case.heads * self.case.head_dim.div_ceil(64)
    }

    fn steps(&mut self, device: &mut Device) {
        let case = self.case;
        let pointers = [self.steps, self.sums, self.dt, self.dt_bias, self.rate, self.spans, self.tiles];
        let rest = [Arg::I32(case.heads as i32), Arg::F32(case.dt_limits.0), Arg::F32(case.dt_limits.1)];
        self.launch(
            device,
            "scan_steps",
            [case.heads.div_ceil(64), self.chunks, 1],
            (64, 0),
            &pointers,
            &rest,
        )
        .expect("no fault");
    }

    /// The state before each chunk, or the gradient of that after it.
    fn states(&mut self, device: &mut Device, [u, v]: [u64; 2], backward: bool) -> u64 {
        let case = self.case;
        let size = case.head_dim * case.states;
        let states = device.allocate(self.chunks * case.heads * size * 2);
        let backward = Arg::I32(i32::from(backward));
        let pointers = [states, u, v, self.steps, self.sums, self.spans, self.tiles];
        let rest = [self.sizes(), vec![backward]].concat();
        let (name, grid) = (self.sized("scan_states"), [self.parts(), self.chunks, 1]);
        self.launch(device, &name, grid, (128, 0), &pointers, &rest).expect("no fault");
        let pointers = [states, self.sums, self.spans, self.span_tiles];
        let rest = [Arg::I32(case.heads as i32), Arg::I32(size as i32), backward];
        let grid = [size.div_ceil(1024), case.heads, case.spans.len()];
        self.launch(device, "scan_pass", grid, (128, 0), &pointers, &rest).expect("no fault");
        states
    }

    fn outputs(&mut self, device: &mut Device, states: u64) -> Result<Vec<f32>, Fault> {
        let y = device.allocate(self.case.x.len() * 2);
        let pointers =
            [y, self.x, self.b, self.c, self.steps, self.sums, self.skip, states, self.spans, self.tiles];
        let (name, grid) = (self.sized("scan_outputs"), [self.parts(), self.chunks, 1]);
        let rest = self.sizes();
        self.launch(device, &name, grid, (128, 0), &pointers, &rest)?;
        Ok(download_bf16(device, y, self.case.x.len()))
    }
}

fn forward(device: &mut Device, case: &Case) -> (Vec<f32>, Vec<(String, Counts)>) {
    let mut placed = Placed::new(device, case);
    placed.steps(device);
    let states = placed.states(device, [placed.x, placed.b], false);
    (placed.outputs(device, states).expect("no fault"), placed.costs)
}

/// Each value is a sum of products of which at most `roundings` factors were rounded to bf16, 2⁻⁹ each of the size of the
/// terms, and was rounded itself; the f32 sums are lost in that. As roundings are as often up as down, the errors
/// together stay far below: within 2⁻⁸ of the values.
#[track_caller]
fn assert_rounded(name: &str, got: &[f32], expected: &[f64], sizes: &[f64], roundings: f64, noise: f64) {
    let (mut errors, mut squares) = (0.0, 0.0);
    for (i, ((&got, &expected), &size)) in got.iter().zip(expected).zip(sizes).enumerate() {
        let error = (f64::from(got) - expected).abs();
        let bound = expected.abs() / 256.0 + size * (roundings / 512.0 + 1e-5) + noise;
        assert!(error <= bound, "{name} at {i}: got {got}, expected {expected} within {bound}");
        errors += error * error;
        squares += expected * expected;
    }
    assert!(
        errors.sqrt() <= squares.sqrt() / 256.0,
        "{name}: errors of {} to {}",
        errors.sqrt(),
        squares.sqrt()
    );
}

const CASES: [(&[usize], [usize; 4]); 4] = [
    (&[66], [1, 64, 1, 128]),
    (&[129, 1, 64], [1, 24, 1, 13]),
    (&[40], [1, 80, 1, 64]),
    (&[2, 33], [4, 7, 2, 16]),
];

#[test]
fn chunks_are_right_at_any_size() {
    for (lengths, sizes) in CASES {
        let case = Case::new(lengths, sizes);
        let (y, _) = in_both_orders(|device| forward(device, &case));
        let name = format!("chunks {lengths:?} {sizes:?}");
        // Scaled x, what a chunk adds, the state.
        assert_rounded(&name, &y, &case.forward(false).0, &case.sizes().forward(false).0, 3.0, 0.0);
    }
}

/// What came of a gradient: dx, db, dc, ddt and drate, and what each launch cost.
type Gradients = ([Vec<f32>; 5], Vec<(String, Counts)>);

fn backward(device: &mut Device, case: &Case) -> Gradients {
    gradients(device, case, None).expect("no fault")
}

fn gradients(device: &mut Device, case: &Case, planted: Option<&'static Module>) -> Result<Gradients, Fault> {
    let mut placed = Placed::new(device, case);
    let dy = upload_bf16(device, &case.dy);
    placed.steps(device);
    let before = placed.states(device, [placed.x, placed.b], false);
    let dafter = placed.states(device, [dy, placed.c], true);
    let [dx, db, dc, ddt] =
        [&case.x, &case.b, &case.c, &case.dt].map(|values| device.allocate(values.len() * 2));
    let drate = device.allocate(case.dt.len() * 4);
    let parts = (case.heads / case.groups).div_ceil(8);
    let partial = device.allocate(2 * parts * case.b.len() * 4);
    let Placed { x, b, c, dt, dt_bias, rate, skip, spans, tiles, steps, sums, .. } = placed;
    let pointers = [
        dx, ddt, drate, partial, dy, x, b, c, dt, dt_bias, rate, skip, steps, sums, before, dafter, spans,
        tiles,
    ];
    let limits = [case.dt_limits.0, case.dt_limits.1].map(Arg::F32);
    let rest = [&[Arg::I32(case.rows() as i32)], &placed.sizes()[..], &limits].concat();
    let shared = if case.states <= 64 { 68384 } else { 92960 };
    let (name, grid) = (placed.sized("scan_gradients"), [case.groups * parts, placed.chunks, 1]);
    placed.planted = planted;
    placed.launch(device, &name, grid, (256, shared), &pointers, &rest)?;
    let rest = [Arg::I64(case.b.len() as i64), Arg::I32(parts as i32)];
    let grid = [case.b.len().div_ceil(2048), 1, 1];
    placed.launch(device, "scan_sum_parts", grid, (256, 0), &[db, dc, partial], &rest)?;
    let [dx, db, dc, ddt] = [(dx, &case.x), (db, &case.b), (dc, &case.c), (ddt, &case.dt)]
        .map(|(at, like)| download_bf16(device, at, like.len()));
    Ok(([dx, db, dc, ddt, download(device, drate, case.dt.len())], placed.costs))
}

#[test]
fn gradients_of_chunks_are_right_at_any_size() {
    for (lengths, sizes) in CASES.into_iter().chain([(&[40][..], [18, 8, 2, 16])]) {
        let case = Case::new(lengths, sizes);
        let (got, _) = in_both_orders(|device| backward(device, &case));
        let (expected, most) = (case.backward(-1.0), case.sizes().backward(1.0));
        let name = format!("chunks {lengths:?} {sizes:?}");
        let pairs = [
            ("dx", expected.dx, most.dx),
            ("db", expected.db, most.db),
            ("dc", expected.dc, most.dc),
            ("ddt", expected.ddt, most.ddt),
            ("drate", expected.drate, most.drate),
        ];
        for ((what, expected, sizes), got) in pairs.into_iter().zip(&got) {
            // Those of dt are differences of sums over their chunk: 64 additions in f32 of terms up to the largest.
            let largest = sizes.iter().copied().fold(0.0, f64::max);
            let noise =
                if what == "ddt" || what == "drate" { largest * 64.0 / f64::from(1 << 24) } else { 0.0 };
            assert_rounded(&format!("{name} {what}"), got, &expected, &sizes, 6.0, noise);
        }
    }
}

#[test]
fn chunks_use_whole_sectors_and_all_banks() {
    let (heads, chunks) = (2, 2);
    let case = Case::new(&[chunks * 64], [heads, 64, 1, 128]);
    let (_, forward) = forward(&mut Device::new(), &case);
    let (_, backward) = backward(&mut Device::new(), &case);
    let cost = |costs: &[(String, Counts)], name: &str| {
        costs.iter().find(|(own, _)| own == name).expect("it was launched").1.clone()
    };
    for (costs, name) in
        [(&forward, "scan_states_128"), (&forward, "scan_pass"), (&forward, "scan_outputs_128")]
    {
        let counts = cost(costs, name);
        assert_eq!((counts.store_efficiency(), counts.bank_conflicts), (1.0, 0), "{name}");
        assert!(counts.load_efficiency() > 0.92, "{name}: {}", counts.load_efficiency());
    }
    // A product of 16 · 8 · 16 an instruction. No state is read by a span's first chunk, nor a gradient of one by its last.
    let (square, wide) = (64 * 64 * 64 / 2048, 64 * 64 * 128 / 2048);
    let all = (heads * chunks) as u64;
    assert_eq!(cost(&forward, "scan_outputs_128").mma, all * (square + 2 * wide) - all / 2 * wide);
    let counts = cost(&backward, "scan_gradients_128");
    let (inside, passed) = (2 * square + 2 * wide, heads as u64 * 3 * wide);
    assert_eq!(counts.mma, all * inside + passed + chunks as u64 * wide);
    assert!(counts.bank_conflicts * 50 < counts.shared_accesses, "{} conflicts", counts.bank_conflicts);
    assert!(counts.warp_instructions < 16 * counts.mma, "{} instructions", counts.warp_instructions);
}

#[test]
fn missing_barriers_are_reported() {
    let case = Case::new(&[128], [1, 64, 1, 64]);
    let broken =
        planted("scan_chunks.cu", "__syncthreads();\n    if (!chunk.first) {", "if (!chunk.first) {");
    let mut device = Device::new();
    let mut placed = Placed::new(&mut device, &case);
    placed.steps(&mut device);
    let states = placed.states(&mut device, [placed.x, placed.b], false);
    placed.planted = Some(broken);
    let fault = placed.outputs(&mut device, states).expect_err("the state overwrites b");
    assert!(is_unordered(&fault), "{fault}");

    let barrier = "mask_products(stage, seen, top, side);\n            __syncthreads();";
    let broken = planted("scan_gradients.cu", barrier, "mask_products(stage, seen, top, side);");
    let fault =
        gradients(&mut device, &case, Some(broken)).expect_err("products are read before they are there");
    assert!(is_unordered(&fault), "{fault}");
}
