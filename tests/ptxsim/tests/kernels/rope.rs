//! `rope.cu` against loops in f64.

use ptxsim::{Arg, Counts, Device, Launch};

use super::orders::in_both_orders;
use crate::harness::{
    Random, Tolerance, assert_close, download_bf16, kernels, round_bf16s, upload, upload_bf16,
};

/// Positions of the tables.
const POSITIONS: usize = 50;

struct Case {
    rows: usize,
    heads: usize,
    head_dim: usize,
    x: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    positions: Vec<i32>,
}

impl Case {
    fn new(rows: usize, heads: usize, head_dim: usize) -> Self {
        let mut random = Random::new((rows * 100 + heads * 10 + head_dim) as u64);
        let angles = random.ranges(POSITIONS * head_dim / 2, -3.0, 3.0);
        Self {
            rows,
            heads,
            head_dim,
            x: round_bf16s(&random.normals(rows * heads * head_dim)),
            cos: angles.iter().map(|angle| angle.cos()).collect(),
            sin: angles.iter().map(|angle| angle.sin()).collect(),
            positions: (0..rows).map(|_| random.below(POSITIONS as u64) as i32).collect(),
        }
    }

    fn run(&self, device: &mut Device, backward: bool) -> (Vec<f32>, Counts) {
        let x = upload_bf16(device, &self.x);
        let (cos, sin) = (upload(device, &self.cos), upload(device, &self.sin));
        let positions = upload(device, &self.positions);
        let threads = self.rows * self.heads.div_ceil(4) * (self.head_dim / 2).div_ceil(8);
        let launch = Launch { grid: [threads.div_ceil(256) as u32, 1, 1], block: [256, 1, 1], shared: 0 };
        let sizes = [self.rows, self.heads, self.head_dim, usize::from(backward)];
        let arguments =
            [&[x, cos, sin, positions].map(Arg::Pointer)[..], &sizes.map(|size| Arg::I32(size as i32))]
                .concat();
        let counts = device.launch(kernels("rope.cu"), "rope", &launch, &arguments).expect("no fault");
        (download_bf16(device, x, self.x.len()), counts)
    }

    fn expected(&self, backward: bool) -> Vec<f64> {
        let mut x: Vec<f64> = self.x.iter().map(|&x| f64::from(x)).collect();
        let half = self.head_dim / 2;
        for (row, &position) in self.positions.iter().enumerate() {
            for head in 0..self.heads {
                for i in 0..half {
                    let angle = position as usize * half + i;
                    let (cos, sin) = (f64::from(self.cos[angle]), f64::from(self.sin[angle]));
                    let sin = if backward { -sin } else { sin };
                    let at = (row * self.heads + head) * self.head_dim + i;
                    let (low, high) = (x[at], x[at + half]);
                    x[at] = low * cos - high * sin;
                    x[at + half] = high * cos + low * sin;
                }
            }
        }
        x
    }
}

#[test]
fn heads_of_any_size_turn_by_their_positions() {
    for (rows, heads, head_dim) in
        [(5, 9, 64), (3, 4, 128), (2, 3, 96), (4, 1, 16), (3, 5, 20), (2, 7, 2), (1, 32, 256)]
    {
        let case = Case::new(rows, heads, head_dim);
        for backward in [false, true] {
            let (got, _) = in_both_orders(|device| case.run(device, backward));
            // Values below 6: two products and a sum in f32.
            let tolerance = Tolerance::bf16(6.0 * 3.0 / f64::from(1 << 24));
            assert_close(
                &format!("rope {rows}x{heads}x{head_dim}"),
                &got,
                &case.expected(backward),
                tolerance,
            );
        }
    }
}

#[test]
fn a_rotation_moves_each_value_once_and_angles_once_for_four_heads() {
    let case = Case::new(8, 32, 128);
    let (_, counts) = case.run(&mut Device::new(), false);
    let sectors = (case.x.len() * 2 / 32) as u64;
    assert_eq!(counts.global_store_sectors, sectors);
    assert_eq!(counts.store_efficiency(), 1.0);
    // Two rows of angles of 64 · 4 bytes for 16 heads of 256, each angle touched by two accesses of 16 bytes.
    assert_eq!(counts.global_load_sectors * 128, sectors * 161);
    assert!(counts.lane_instructions < 9 * case.x.len() as u64, "{} instructions", counts.lane_instructions);
}
