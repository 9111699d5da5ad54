//! Runs PTX (first cut).
#![allow(warnings, clippy::all, reason = "first cut, replaced next")]
use crate::Arg;
use crate::parse::*;
use std::collections::{BTreeMap, VecDeque};
pub type R = [u64; 32];
#[derive(Default, Debug, Clone)]
pub struct Stats {
    pub instrs: u64,
    pub lane_instrs: u64,
    pub mma: u64,
    pub shared_acc: u64,
    pub bank_extra: u64,
    pub gl_sectors: u64,
    pub gl_bytes: u64,
    pub gs_sectors: u64,
    pub gs_bytes: u64,
    pub problems: BTreeMap<String, u64>,
    pub ops: BTreeMap<String, u64>,
}
pub struct Gpu {
    pub bufs: Vec<Vec<u8>>,
    pub consts: Vec<u8>,
    pub stats: Stats,
    pub check: bool,
    pub reverse: bool,
}
#[derive(Clone, Copy, Default)]
struct Sh {
    we: u32,
    ww: u16,
    re: u32,
    rw: u16,
    rmulti: bool,
    init: bool,
}
struct Warp {
    id: u32,
    pc: [u32; 32],
    exited: u32,
    bar: bool,
    regs: Vec<R>,
    pend: Vec<VecDeque<Vec<(u64, u64, u32, u32)>>>,
    cur: Vec<Vec<(u64, u64, u32, u32)>>,
}
const DONE: u32 = u32::MAX;
#[derive(Clone, Copy, PartialEq)]
enum Sp {
    Gen,
    Global,
    Shared,
    Const,
    Param,
}
fn bf2f(x: u64) -> f32 {
    f32::from_bits((x as u32) << 16)
}
fn f2bf(x: f32) -> u64 {
    let u = x.to_bits();
    if x.is_nan() {
        return 0x7fff;
    }
    ((u.wrapping_add(0x7fff + ((u >> 16) & 1))) >> 16) as u64
}
fn h2f(h: u64) -> f32 {
    let h = h as u32;
    let s = (h >> 15) << 31;
    let e = (h >> 10) & 31;
    let m = h & 0x3ff;
    f32::from_bits(
        s | if e == 0 {
            if m == 0 {
                0
            } else {
                let z = m.leading_zeros() - 21;
                ((113 - z) << 23) | ((m << (13 + z)) & 0x7fffff)
            }
        } else if e == 31 {
            0x7f800000 | (m << 13)
        } else {
            ((e + 112) << 23) | (m << 13)
        },
    )
}
fn f2h(x: f32) -> u64 {
    let u = x.to_bits();
    let s = ((u >> 16) & 0x8000) as u64;
    let a = u & 0x7fffffff;
    if a > 0x7f800000 {
        return 0x7fff;
    }
    if a >= 0x477ff000 {
        return s | 0x7c00;
    }
    if a < 0x38800000 {
        let e = (a >> 23) as i32;
        if e < 102 {
            return s;
        }
        let m = (a & 0x7fffff) | 0x800000;
        let sh = 126 - e;
        let r = m >> sh;
        let rem = m & ((1 << sh) - 1);
        let half = 1 << (sh - 1);
        return s | (r + ((rem > half || (rem == half && r & 1 == 1)) as u32)) as u64;
    }
    let r = (a - 0x38000000) >> 13;
    let rem = a & 0x1fff;
    s | (r + ((rem > 0x1000 || (rem == 0x1000 && r & 1 == 1)) as u32)) as u64
}
fn msk(w: u32) -> u64 {
    if w >= 64 { u64::MAX } else { (1u64 << w) - 1 }
}
fn sx(v: u64, w: u32) -> i64 {
    if w >= 64 { v as i64 } else { ((v << (64 - w)) as i64) >> (64 - w) }
}
fn fl(v: u64, t: Ty) -> f64 {
    match (t.k, t.w) {
        (K::BF, _) => bf2f(v) as f64,
        (_, 16) => h2f(v) as f64,
        (_, 32) => f32::from_bits(v as u32) as f64,
        _ => f64::from_bits(v),
    }
}
fn unfl(x: f64, t: Ty) -> u64 {
    match (t.k, t.w) {
        (K::BF, _) => f2bf(x as f32),
        (_, 16) => f2h(x as f32),
        (_, 32) => (x as f32).to_bits() as u64,
        _ => x.to_bits(),
    }
}
impl Gpu {
    pub fn new() -> Gpu {
        Gpu { bufs: vec![], consts: vec![], stats: Stats::default(), check: true, reverse: false }
    }
    fn problem(&mut self, s: String) {
        *self.stats.problems.entry(s).or_default() += 1;
    }
    fn gl(&mut self, a: u64, n: u32, i: &Inst) -> Option<(usize, usize)> {
        let b = (a >> 36) as usize;
        let o = (a & ((1 << 36) - 1)) as usize;
        if b == 0 || b > self.bufs.len() || o + n as usize > self.bufs[b - 1].len() {
            self.problem(format!(
                "line {}: out of bounds global access of {} bytes at buffer {} offset {:#x}: {}",
                i.line, n, b, o, i.text
            ));
            return None;
        }
        if a % n as u64 != 0 {
            self.problem(format!("line {}: misaligned: {}", i.line, i.text));
            return None;
        }
        Some((b - 1, o))
    }
    pub fn launch(
        &mut self,
        k: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        dynsmem: usize,
        args: &[Arg],
    ) -> Result<(), String> {
        if args.len() != k.params.len() {
            return Err(format!("{} wants {} args", k.name, k.params.len()));
        }
        let mut pb = vec![0u8; k.psize + 16];
        for (a, (n, o, s)) in args.iter().zip(&k.params) {
            let (v, sz) = match *a {
                Arg::Pointer(p) => (p, 8),
                Arg::U64(p) => (p, 8),
                Arg::U32(x) => (x as u64, 4),
                Arg::I32(x) => (x as u32 as u64, 4),
                Arg::F32(x) => (x.to_bits() as u64, 4),
                Arg::I64(x) => (x as u64, 8),
            };
            if sz != *s {
                return Err(format!("param {n}: {s} bytes, given {sz}"));
            }
            pb[*o..*o + sz].copy_from_slice(&v.to_le_bytes()[..sz]);
        }
        for z in 0..grid[2] {
            for y in 0..grid[1] {
                for x in 0..grid[0] {
                    self.block(k, [x, y, z], grid, block, dynsmem, &pb)?;
                }
            }
        }
        Ok(())
    }
    fn block(
        &mut self,
        k: &Kernel,
        cta: [u32; 3],
        grid: [u32; 3],
        blk: [u32; 3],
        dynsmem: usize,
        pb: &[u8],
    ) -> Result<(), String> {
        let nt = blk[0] * blk[1] * blk[2];
        let nw = nt.div_ceil(32);
        let mut sm = vec![0xffu8; k.smem + dynsmem];
        let mut sh = vec![Sh::default(); if self.check { sm.len() } else { 0 }];
        let mut ep = 1u32;
        let mut ws: Vec<Warp> = (0..nw)
            .map(|w| {
                let n = (nt - w * 32).min(32);
                Warp {
                    id: w,
                    pc: std::array::from_fn(|l| if (l as u32) < n { 0 } else { DONE }),
                    exited: if n == 32 { 0 } else { u32::MAX << n },
                    bar: false,
                    regs: vec![[0xdead_beef_dead_beef; 32]; k.nregs],
                    pend: vec![VecDeque::new(); 32],
                    cur: vec![vec![]; 32],
                }
            })
            .collect();
        loop {
            let mut ran = false;
            let ord: Vec<usize> =
                if self.reverse { (0..ws.len()).rev().collect() } else { (0..ws.len()).collect() };
            for wi in ord {
                let w = &mut ws[wi];
                if w.bar || w.exited == u32::MAX {
                    continue;
                }
                ran = true;
                self.warp(k, w, cta, grid, blk, &mut sm, &mut sh, ep, pb)?;
            }
            if ws.iter().all(|w| w.exited == u32::MAX) {
                return Ok(());
            }
            if ws.iter().all(|w| w.bar || w.exited == u32::MAX) {
                ep += 1;
                for w in ws.iter_mut() {
                    w.bar = false
                }
            } else if !ran {
                return Err("deadlock".into());
            }
        }
    }
    fn rd(&self, w: &Warp, o: &Opnd, cta: &[u32; 3], grid: &[u32; 3], blk: &[u32; 3]) -> R {
        match o {
            Opnd::Reg(r) => w.regs[*r as usize],
            Opnd::Imm(v) => [*v; 32],
            Opnd::Sreg(s) => std::array::from_fn(|l| {
                let t = w.id * 32 + l as u32;
                (match s {
                    0 => t % blk[0],
                    1 => t / blk[0] % blk[1],
                    2 => t / (blk[0] * blk[1]),
                    3..=5 => blk[*s as usize - 3],
                    6..=8 => cta[*s as usize - 6],
                    9..=11 => grid[*s as usize - 9],
                    12 => l as u32,
                    13 => w.id,
                    14 => (1u32 << l) - 1,
                    15 => ((2u64 << l) - 1) as u32,
                    16 => !(((2u64 << l) - 1) as u32),
                    _ => 1 << l,
                }) as u64
            }),
            _ => panic!("operand {o:?}"),
        }
    }
    #[allow(clippy::too_many_arguments)]
    fn warp(
        &mut self,
        k: &Kernel,
        w: &mut Warp,
        cta: [u32; 3],
        grid: [u32; 3],
        blk: [u32; 3],
        sm: &mut [u8],
        sh: &mut [Sh],
        ep: u32,
        pb: &[u8],
    ) -> Result<(), String> {
        loop {
            let pc = *w.pc.iter().min().unwrap();
            if pc == DONE {
                w.exited = u32::MAX;
                return Ok(());
            }
            let mut mask = 0u32;
            for l in 0..32 {
                if w.pc[l] == pc {
                    mask |= 1 << l
                }
            }
            let i = &k.insts[pc as usize];
            let all = mask;
            if let Some((p, neg)) = i.pred {
                let r = &w.regs[p as usize];
                let mut pm = 0u32;
                for l in 0..32 {
                    if (r[l] & 1 == 1) != neg {
                        pm |= 1 << l
                    }
                }
                mask &= pm;
            }
            self.stats.instrs += 1;
            *self.stats.ops.entry(i.op.clone()).or_default() += 1;
            self.stats.lane_instrs += mask.count_ones() as u64;
            for l in 0..32 {
                if all >> l & 1 == 1 {
                    w.pc[l] = pc + 1
                }
            }
            if mask == 0 {
                continue;
            }
            let t = *i.tys.first().unwrap_or(&Ty { k: K::B, w: 32, x2: false });
            let has = |s: &str| i.m.iter().any(|x| x == s);
            macro_rules! src {
                ($n:expr) => {
                    self.rd(w, &i.o[$n], &cta, &grid, &blk)
                };
            }
            macro_rules! put {
                ($o:expr,$f:expr) => {
                    if let Opnd::Reg(r) = $o {
                        let d = &mut w.regs[*r as usize];
                        for l in 0..32 {
                            if mask >> l & 1 == 1 {
                                d[l] = $f(l)
                            }
                        }
                    } else if !matches!($o, Opnd::Sink) {
                        return Err(format!("dest {}", i.text));
                    }
                };
            }
            macro_rules! f2 {
                ($op:expr) => {{
                    let (a, b) = (src!(1), src!(2));
                    if t.x2 {
                        let h = Ty { k: t.k, w: 16, x2: false };
                        put!(&i.o[0], |l: usize| unfl($op(fl(a[l] & 0xffff, h), fl(b[l] & 0xffff, h)), h)
                            | unfl($op(fl(a[l] >> 16 & 0xffff, h), fl(b[l] >> 16 & 0xffff, h)), h) << 16)
                    } else {
                        put!(&i.o[0], |l: usize| unfl($op(fl(a[l], t), fl(b[l], t)), t))
                    }
                }};
            }
            macro_rules! i2 {
                ($op:expr) => {{
                    let (a, b) = (src!(1), src!(2));
                    put!(&i.o[0], |l: usize| ($op(sx(a[l], t.w), sx(b[l], t.w)) as u64) & msk(t.w))
                }};
            }
            macro_rules! u2 {
                ($op:expr) => {{
                    let (a, b) = (src!(1), src!(2));
                    let m = msk(t.w);
                    put!(&i.o[0], |l: usize| ($op(a[l] & m, b[l] & m) as u64) & m)
                }};
            }
            let isf = matches!(t.k, K::F | K::BF);
            match i.op.as_str() {
                "mov" | "cvta" => {
                    if let Opnd::Vec(v) = &i.o[0] {
                        let a = src!(1);
                        let ww = t.w / v.len() as u32;
                        for (j, d) in v.iter().enumerate() {
                            put!(d, |l: usize| (a[l] >> (j as u32 * ww)) & msk(ww))
                        }
                    } else if let Opnd::Vec(v) = &i.o[1] {
                        let ww = t.w / v.len() as u32;
                        let rs: Vec<R> = v.iter().map(|x| self.rd(w, x, &cta, &grid, &blk)).collect();
                        put!(&i.o[0], |l: usize| rs
                            .iter()
                            .enumerate()
                            .fold(0, |a, (j, r)| a | (r[l] & msk(ww)) << (j as u32 * ww)))
                    } else {
                        let a = src!(1);
                        let m = msk(t.w);
                        let shr = i.op == "cvta" && has("shared");
                        let to = has("to");
                        put!(&i.o[0], |l: usize| {
                            let v = a[l];
                            if shr && to {
                                v.wrapping_sub(SHARED_W)
                            } else if shr {
                                if v >= SHARED_W { v } else { v + SHARED_W }
                            } else if t.w == 32 && v >= SHARED_W && v < CONST_W && v != 0xdead_beef_dead_beef
                            {
                                (v - SHARED_W) & m
                            } else {
                                v & m
                            }
                        })
                    }
                }
                "ld" | "st" | "ldu" => {
                    let st = i.op == "st";
                    let sp = if has("global") {
                        Sp::Global
                    } else if has("shared") {
                        Sp::Shared
                    } else if has("const") {
                        Sp::Const
                    } else if has("param") {
                        Sp::Param
                    } else {
                        Sp::Gen
                    };
                    let (mo, ro) = if st { (&i.o[0], &i.o[1]) } else { (&i.o[1], &i.o[0]) };
                    let (b, off) =
                        if let Opnd::Mem(b, o) = mo { (b, *o) } else { return Err(i.text.clone()) };
                    let a = self.rd(w, b, &cta, &grid, &blk);
                    let one = [ro.clone()];
                    let regs: &[Opnd] = if let Opnd::Vec(v) = ro { v } else { &one };
                    let eb = t.w / 8;
                    let n = eb * regs.len() as u32;
                    let addr: R = std::array::from_fn(|l| a[l].wrapping_add(off as u64));
                    let vals: Vec<R> = if st {
                        regs.iter().map(|x| self.rd(w, x, &cta, &grid, &blk)).collect()
                    } else {
                        vec![]
                    };
                    let mut outv = vec![[0u64; 32]; regs.len()];
                    let mut sec: Vec<u64> = vec![];
                    let mut shd = false;
                    for l in 0..32 {
                        if mask >> l & 1 == 0 {
                            continue;
                        }
                        let ad = addr[l];
                        let sp2 = if sp == Sp::Gen {
                            if ad >= CONST_W && ad < CONST_W + (1 << 32) {
                                Sp::Const
                            } else if ad >= SHARED_W && ad < SHARED_W + (1 << 32) {
                                Sp::Shared
                            } else {
                                Sp::Global
                            }
                        } else {
                            sp
                        };
                        match sp2 {
                            Sp::Shared => {
                                shd = true;
                                let o = (if ad >= SHARED_W { ad - SHARED_W } else { ad }) as usize;
                                if o + n as usize > sm.len() {
                                    self.problem(format!(
                                        "line {}: shared out of bounds {o:#x}+{n}: {}",
                                        i.line, i.text
                                    ));
                                    continue;
                                }
                                if o % n as usize != 0 {
                                    self.problem(format!("line {}: misaligned shared: {}", i.line, i.text));
                                    continue;
                                }
                                if self.check {
                                    self.shcheck(sh, o, n, w.id, ep, st, i);
                                }
                                for (j, _) in regs.iter().enumerate() {
                                    let q = o + j * eb as usize;
                                    if st {
                                        sm[q..q + eb as usize]
                                            .copy_from_slice(&vals[j][l].to_le_bytes()[..eb as usize])
                                    } else {
                                        let mut x = [0u8; 8];
                                        x[..eb as usize].copy_from_slice(&sm[q..q + eb as usize]);
                                        outv[j][l] = u64::from_le_bytes(x)
                                    }
                                }
                            }
                            Sp::Global => {
                                if let Some((bi, o)) = self.gl(ad, n, i) {
                                    sec.push(ad >> 5);
                                    if n > 32 {
                                        sec.push((ad >> 5) + 1)
                                    }
                                    for (j, _) in regs.iter().enumerate() {
                                        let q = o + j * eb as usize;
                                        let b = &mut self.bufs[bi];
                                        if st {
                                            b[q..q + eb as usize]
                                                .copy_from_slice(&vals[j][l].to_le_bytes()[..eb as usize])
                                        } else {
                                            let mut x = [0u8; 8];
                                            x[..eb as usize].copy_from_slice(&b[q..q + eb as usize]);
                                            outv[j][l] = u64::from_le_bytes(x)
                                        }
                                    }
                                }
                            }
                            Sp::Const | Sp::Param => {
                                let (src, o) = if sp2 == Sp::Const {
                                    (
                                        &self.consts[..],
                                        (if ad >= CONST_W { ad - CONST_W } else { ad }) as usize,
                                    )
                                } else {
                                    (pb, ad as usize)
                                };
                                for (j, _) in regs.iter().enumerate() {
                                    let q = o + j * eb as usize;
                                    let mut x = [0u8; 8];
                                    x[..eb as usize].copy_from_slice(&src[q..q + eb as usize]);
                                    outv[j][l] = u64::from_le_bytes(x)
                                }
                            }
                            Sp::Gen => unreachable!(),
                        }
                    }
                    if !sec.is_empty() {
                        sec.sort_unstable();
                        sec.dedup();
                        let by = (mask.count_ones() * n) as u64;
                        if st {
                            self.stats.gs_sectors += sec.len() as u64;
                            self.stats.gs_bytes += by
                        } else {
                            self.stats.gl_sectors += sec.len() as u64;
                            self.stats.gl_bytes += by
                        }
                    }
                    if shd {
                        self.banks(&addr, mask, n)
                    }
                    if !st {
                        for (j, d) in regs.iter().enumerate() {
                            let v = outv[j];
                            put!(d, |l: usize| if t.k == K::S { sx(v[l], t.w) as u64 } else { v[l] })
                        }
                    }
                }
                "add" if isf => {
                    f2!(|a: f64, b: f64| if t.w == 64 { a + b } else { (a as f32 + b as f32) as f64 })
                }
                "sub" if isf => {
                    f2!(|a: f64, b: f64| if t.w == 64 { a - b } else { (a as f32 - b as f32) as f64 })
                }
                "mul" if isf => {
                    f2!(|a: f64, b: f64| if t.w == 64 { a * b } else { (a as f32 * b as f32) as f64 })
                }
                "div" if isf => {
                    f2!(|a: f64, b: f64| if t.w == 64 { a / b } else { (a as f32 / b as f32) as f64 })
                }
                "min" if isf => f2!(|a: f64, b: f64| a.min(b)),
                "max" if isf => f2!(|a: f64, b: f64| a.max(b)),
                "fma" => {
                    let (a, b, c) = (src!(1), src!(2), src!(3));
                    if t.x2 {
                        let h = Ty { k: t.k, w: 16, x2: false };
                        let f = |a: u64, b: u64, c: u64| {
                            unfl(fl(a & 0xffff, h).mul_add(fl(b & 0xffff, h), fl(c & 0xffff, h)), h)
                        };
                        put!(&i.o[0], |l: usize| f(a[l], b[l], c[l])
                            | f(a[l] >> 16, b[l] >> 16, c[l] >> 16) << 16)
                    } else if t.w == 32 {
                        put!(&i.o[0], |l: usize| f32::from_bits(a[l] as u32)
                            .mul_add(f32::from_bits(b[l] as u32), f32::from_bits(c[l] as u32))
                            .to_bits() as u64)
                    } else {
                        put!(&i.o[0], |l: usize| unfl(fl(a[l], t).mul_add(fl(b[l], t), fl(c[l], t)), t))
                    }
                }
                "add" => u2!(|a: u64, b: u64| a.wrapping_add(b)),
                "sub" => u2!(|a: u64, b: u64| a.wrapping_sub(b)),
                "and" => u2!(|a, b| a & b),
                "or" => u2!(|a, b| a | b),
                "xor" => u2!(|a, b| a ^ b),
                "mul" if has("wide") => {
                    let (a, b) = (src!(1), src!(2));
                    put!(&i.o[0], |l: usize| if t.k == K::S {
                        (sx(a[l], t.w).wrapping_mul(sx(b[l], t.w)) as u64) & msk(t.w * 2)
                    } else {
                        ((a[l] & msk(t.w)).wrapping_mul(b[l] & msk(t.w))) & msk(t.w * 2)
                    })
                }
                "mul" if has("hi") => {
                    let (a, b) = (src!(1), src!(2));
                    put!(&i.o[0], |l: usize| if t.k == K::S {
                        ((sx(a[l], t.w) as i128 * sx(b[l], t.w) as i128) >> t.w) as u64 & msk(t.w)
                    } else {
                        (((a[l] & msk(t.w)) as u128 * (b[l] & msk(t.w)) as u128) >> t.w) as u64
                    })
                }
                "mul" => u2!(|a: u64, b: u64| a.wrapping_mul(b)),
                "mad" => {
                    let (a, b, c) = (src!(1), src!(2), src!(3));
                    if has("wide") {
                        put!(&i.o[0], |l: usize| ((if t.k == K::S {
                            sx(a[l], t.w).wrapping_mul(sx(b[l], t.w)) as u64
                        } else {
                            (a[l] & msk(t.w)).wrapping_mul(b[l] & msk(t.w))
                        })
                        .wrapping_add(c[l]))
                            & msk(t.w * 2))
                    } else {
                        put!(&i.o[0], |l: usize| a[l].wrapping_mul(b[l]).wrapping_add(c[l]) & msk(t.w))
                    }
                }
                "div" | "rem" => {
                    let d = i.op == "div";
                    if t.k == K::S {
                        i2!(|a: i64, b: i64| if b == 0 {
                            -1
                        } else if d {
                            a.wrapping_div(b)
                        } else {
                            a.wrapping_rem(b)
                        })
                    } else {
                        u2!(|a: u64, b: u64| if b == 0 {
                            u64::MAX
                        } else if d {
                            a / b
                        } else {
                            a % b
                        })
                    }
                }
                "min" => {
                    if t.k == K::S {
                        i2!(|a: i64, b: i64| a.min(b))
                    } else {
                        u2!(|a: u64, b: u64| a.min(b))
                    }
                }
                "max" => {
                    if t.k == K::S {
                        i2!(|a: i64, b: i64| a.max(b))
                    } else {
                        u2!(|a: u64, b: u64| a.max(b))
                    }
                }
                "shl" => {
                    let (a, b) = (src!(1), src!(2));
                    put!(&i.o[0], |l: usize| {
                        let s = b[l] & 0xffffffff;
                        if s >= t.w as u64 { 0 } else { (a[l] << s) & msk(t.w) }
                    })
                }
                "shr" => {
                    let (a, b) = (src!(1), src!(2));
                    put!(&i.o[0], |l: usize| {
                        let s = (b[l] & 0xffffffff).min(t.w as u64);
                        if t.k == K::S {
                            ((sx(a[l], t.w) as i128) >> s) as u64 & msk(t.w)
                        } else if s >= t.w as u64 {
                            0
                        } else {
                            (a[l] & msk(t.w)) >> s
                        }
                    })
                }
                "not" => {
                    let a = src!(1);
                    put!(&i.o[0], |l: usize| !a[l] & msk(t.w))
                }
                "neg" if isf => {
                    let a = src!(1);
                    put!(&i.o[0], |l: usize| unfl(-fl(a[l], t), t))
                }
                "neg" => {
                    let a = src!(1);
                    put!(&i.o[0], |l: usize| a[l].wrapping_neg() & msk(t.w))
                }
                "abs" if isf => {
                    let a = src!(1);
                    put!(&i.o[0], |l: usize| unfl(fl(a[l], t).abs(), t))
                }
                "abs" => {
                    let a = src!(1);
                    put!(&i.o[0], |l: usize| sx(a[l], t.w).unsigned_abs() & msk(t.w))
                }
                "prmt" => {
                    let (a, b, c) = (src!(1), src!(2), src!(3));
                    put!(&i.o[0], |l: usize| {
                        let v = (a[l] & msk(32)) | (b[l] << 32);
                        let mut r = 0;
                        for q in 0..4 {
                            let s = (c[l] >> (4 * q)) & 15;
                            let mut by = (v >> ((s & 7) * 8)) & 0xff;
                            if s & 8 != 0 {
                                by = if by & 0x80 != 0 { 0xff } else { 0 }
                            }
                            r |= by << (8 * q)
                        }
                        r
                    })
                }
                "bfi" => {
                    let (a, b, at, len) = (src!(1), src!(2), src!(3), src!(4));
                    put!(&i.o[0], |l: usize| {
                        let (at, len) = ((at[l] & 255).min(63) as u32, (len[l] & 255).min(t.w as u64) as u32);
                        let field = msk(len) << at & msk(t.w);
                        b[l] & !field | a[l] << at & field
                    })
                }
                "bfe" => {
                    let (a, b, c) = (src!(1), src!(2), src!(3));
                    put!(&i.o[0], |l: usize| {
                        let n = (c[l] & 255).min(t.w as u64) as u32;
                        let s = (b[l] & 255) as u32;
                        let v = if s >= t.w { 0 } else { (a[l] & msk(t.w)) >> s };
                        if n == 0 {
                            0
                        } else if t.k == K::S {
                            sx(v & msk(n), n) as u64 & msk(t.w)
                        } else {
                            v & msk(n)
                        }
                    })
                }
                "bfi" => {
                    let (a, b, c, d) = (src!(1), src!(2), src!(3), src!(4));
                    put!(&i.o[0], |l: usize| {
                        let (at, n) = ((c[l] & 255).min(64) as u32, (d[l] & 255).min(32) as u32);
                        let field = if at >= t.w { 0 } else { msk(n.max(1)) << at & msk(t.w) };
                        if n == 0 { b[l] } else { b[l] & !field | a[l] << at.min(63) & field }
                    })
                }
                "lop3" => {
                    let (a, b, c, f) = (src!(1), src!(2), src!(3), src!(4));
                    put!(&i.o[0], |l: usize| {
                        let mut r = 0u64;
                        for q in 0..8u64 {
                            if f[l] >> q & 1 == 1 {
                                r |= (if q & 4 != 0 { a[l] } else { !a[l] })
                                    & (if q & 2 != 0 { b[l] } else { !b[l] })
                                    & (if q & 1 != 0 { c[l] } else { !c[l] })
                            }
                        }
                        r & msk(32)
                    })
                }
                "shf" => {
                    let (a, b, c) = (src!(1), src!(2), src!(3));
                    let left = has("l");
                    let wrap = has("wrap");
                    put!(&i.o[0], |l: usize| {
                        let s = if wrap { c[l] & 31 } else { (c[l] & 0xffffffff).min(32) };
                        let v = (a[l] & msk(32)) | ((b[l] & msk(32)) << 32);
                        if left { ((v << s) >> 32) & msk(32) } else { (v >> s) & msk(32) }
                    })
                }
                "popc" => {
                    let a = src!(1);
                    put!(&i.o[0], |l: usize| (a[l] & msk(t.w)).count_ones() as u64)
                }
                "clz" => {
                    let a = src!(1);
                    put!(&i.o[0], |l: usize| ((a[l] & msk(t.w)).leading_zeros() - (64 - t.w)) as u64)
                }
                "selp" => {
                    let (a, b, c) = (src!(1), src!(2), src!(3));
                    put!(&i.o[0], |l: usize| if c[l] & 1 == 1 { a[l] } else { b[l] })
                }
                "setp" => {
                    let (a, b) = (src!(1), src!(2));
                    let c = i.m[0].clone();
                    let bo = i.m.get(1).filter(|x| ["and", "or", "xor"].contains(&x.as_str())).cloned();
                    let p = if bo.is_some() { src!(3) } else { [0; 32] };
                    let cmp = |l: usize| -> bool {
                        let r = if isf {
                            let (x, y) = (fl(a[l], t), fl(b[l], t));
                            let nan = x.is_nan() || y.is_nan();
                            match c.as_str() {
                                "eq" => x == y,
                                "ne" => x != y && !nan,
                                "lt" => x < y,
                                "le" => x <= y,
                                "gt" => x > y,
                                "ge" => x >= y,
                                "equ" => x == y || nan,
                                "neu" => x != y || nan,
                                "ltu" => x < y || nan,
                                "leu" => x <= y || nan,
                                "gtu" => x > y || nan,
                                "geu" => x >= y || nan,
                                "num" => !nan,
                                _ => nan,
                            }
                        } else {
                            let o = if t.k == K::S {
                                sx(a[l], t.w).cmp(&sx(b[l], t.w))
                            } else {
                                (a[l] & msk(t.w)).cmp(&(b[l] & msk(t.w)))
                            };
                            match c.as_str() {
                                "eq" => o.is_eq(),
                                "ne" => o.is_ne(),
                                "lt" | "lo" => o.is_lt(),
                                "le" | "ls" => o.is_le(),
                                "gt" | "hi" => o.is_gt(),
                                _ => o.is_ge(),
                            }
                        };
                        match bo.as_deref() {
                            Some("and") => r && p[l] & 1 == 1,
                            Some("or") => r || p[l] & 1 == 1,
                            Some("xor") => r ^ (p[l] & 1 == 1),
                            _ => r,
                        }
                    };
                    let res: R = std::array::from_fn(|l| cmp(l) as u64);
                    put!(&i.o[0], |l: usize| res[l]);
                    if let Some(d) = i.d2 {
                        let o = Opnd::Reg(d);
                        put!(&o, |l: usize| 1 - res[l])
                    }
                }
                "cvt" => {
                    let dt = i.tys[0];
                    if dt.x2 {
                        let (h, lo) = (src!(1), src!(2));
                        let e = Ty { k: dt.k, w: 16, x2: false };
                        put!(&i.o[0], |l: usize| unfl(fl(h[l], i.tys[1]), e) << 16
                            | unfl(fl(lo[l], i.tys[1]), e))
                    } else {
                        let s = i.tys[1];
                        let a = src!(1);
                        let df = matches!(dt.k, K::F | K::BF);
                        let sf = matches!(s.k, K::F | K::BF);
                        let r =
                            i.m.iter()
                                .find(|x| x.starts_with('r') && x.len() <= 3)
                                .cloned()
                                .unwrap_or_default();
                        put!(&i.o[0], |l: usize| {
                            if sf {
                                let mut x = fl(a[l], s);
                                if r.ends_with('i') {
                                    x = match r.as_str() {
                                        "rzi" => x.trunc(),
                                        "rmi" => x.floor(),
                                        "rpi" => x.ceil(),
                                        _ => x.round_ties_even(),
                                    }
                                }
                                if df {
                                    if has("sat") {
                                        x = x.clamp(0., 1.)
                                    }
                                    unfl(x, dt)
                                } else if dt.k == K::S {
                                    let m = (1i128 << (dt.w - 1)) as f64;
                                    (x.clamp(-m, m - 1.) as i64) as u64 & msk(dt.w)
                                } else {
                                    x.clamp(0., msk(dt.w) as f64) as u64
                                }
                            } else {
                                let v: i128 = if s.k == K::S {
                                    sx(a[l], s.w) as i128
                                } else {
                                    (a[l] & msk(s.w)) as i128
                                };
                                if df {
                                    if dt.w == 32 { (v as f32).to_bits() as u64 } else { unfl(v as f64, dt) }
                                } else {
                                    v as u64 & msk(dt.w)
                                }
                            }
                        })
                    }
                }
                "rsqrt" | "rcp" | "sqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => {
                    let a = src!(1);
                    let o = i.op.clone();
                    put!(&i.o[0], |l: usize| {
                        let x = fl(a[l], t);
                        unfl(
                            match o.as_str() {
                                "rsqrt" => 1. / x.sqrt(),
                                "rcp" => 1. / x,
                                "sqrt" => x.sqrt(),
                                "ex2" => x.exp2(),
                                "lg2" => x.log2(),
                                "sin" => x.sin(),
                                "cos" => x.cos(),
                                _ => x.tanh(),
                            },
                            t,
                        )
                    })
                }
                "bra" => {
                    let tg = if let Opnd::Label(x) = i.o[0] { x as u32 } else { return Err(i.text.clone()) };
                    for l in 0..32 {
                        if mask >> l & 1 == 1 {
                            w.pc[l] = tg
                        }
                    }
                }
                "ret" | "exit" => {
                    for l in 0..32 {
                        if mask >> l & 1 == 1 {
                            w.pc[l] = DONE
                        }
                    }
                }
                "bar" | "barrier" => {
                    if has("warp") {
                        continue;
                    }
                    let live = (0..32).filter(|&l| w.pc[l] != DONE).fold(0u32, |m, l| m | 1 << l);
                    if mask != live {
                        self.problem(format!(
                            "line {}: bar.sync reached by lanes {mask:08x} of {live:08x}",
                            i.line
                        ));
                    }
                    w.bar = true;
                    return Ok(());
                }
                "membar" | "fence" => {}
                "activemask" => put!(&i.o[0], |_l: usize| mask as u64),
                "vote" => {
                    let p = src!(1);
                    let mut b = 0u32;
                    for l in 0..32 {
                        if mask >> l & 1 == 1 && p[l] & 1 == 1 {
                            b |= 1 << l
                        }
                    }
                    let all = b == mask;
                    put!(&i.o[0], |_l: usize| if has("ballot") {
                        b as u64
                    } else if has("any") {
                        (b != 0) as u64
                    } else {
                        all as u64
                    })
                }
                "shfl" => {
                    let (a, b, c) = (src!(1), src!(2), src!(3));
                    let mode = i.m[1].as_str();
                    let mut ps = [0u64; 32];
                    let mut bad = 0;
                    let v: R = std::array::from_fn(|l| {
                        let cl = (c[l] & 31) as i32;
                        let sg = ((c[l] >> 8) & 31) as i32;
                        let li = l as i32;
                        let bv = (b[l] & 31) as i32;
                        let maxl = (li & sg) | (cl & !sg);
                        let minl = li & sg;
                        let (j, ok) = match mode {
                            "up" => (li - bv, li - bv >= maxl),
                            "down" => (li + bv, li + bv <= maxl),
                            "bfly" => (li ^ bv, (li ^ bv) <= maxl),
                            _ => {
                                let j = minl | (bv & !sg);
                                (j, j <= maxl)
                            }
                        };
                        ps[l] = ok as u64;
                        let j = if ok { j as usize } else { l };
                        if mask >> l & 1 == 1 && mask >> j & 1 == 0 {
                            bad += 1
                        }
                        a[j]
                    });
                    if bad > 0 {
                        self.problem(format!("line {}: shfl reads an inactive lane", i.line));
                    }
                    put!(&i.o[0], |l: usize| v[l]);
                    if let Some(d) = i.d2 {
                        let o = Opnd::Reg(d);
                        put!(&o, |l: usize| ps[l])
                    }
                }
                "atom" | "red" => {
                    let red = i.op == "red";
                    let mo = if red { &i.o[0] } else { &i.o[1] };
                    let (b, off) =
                        if let Opnd::Mem(b, o) = mo { (b, *o) } else { return Err(i.text.clone()) };
                    let a = self.rd(w, b, &cta, &grid, &blk);
                    let v = src!(if red { 1 } else { 2 });
                    let shd = has("shared");
                    let eb = (t.w / 8) as usize;
                    let mut old = [0u64; 32];
                    for l in 0..32 {
                        if mask >> l & 1 == 0 {
                            continue;
                        }
                        let ad = a[l].wrapping_add(off as u64);
                        let cell: &mut [u8] = if shd {
                            let o = (if ad >= SHARED_W { ad - SHARED_W } else { ad }) as usize;
                            &mut sm[o..o + eb]
                        } else {
                            match self.gl(ad, eb as u32, i) {
                                Some((bi, o)) => &mut self.bufs[bi][o..o + eb],
                                None => continue,
                            }
                        };
                        let mut x = [0u8; 8];
                        x[..eb].copy_from_slice(cell);
                        let o = u64::from_le_bytes(x);
                        old[l] = o;
                        let n = if isf && has("add") {
                            if t.w == 32 {
                                (f32::from_bits(o as u32) + f32::from_bits(v[l] as u32)).to_bits() as u64
                            } else {
                                unfl(fl(o, t) + fl(v[l], t), t)
                            }
                        } else if has("add") {
                            o.wrapping_add(v[l])
                        } else if has("max") {
                            if t.k == K::S { sx(o, t.w).max(sx(v[l], t.w)) as u64 } else { o.max(v[l]) }
                        } else if has("min") {
                            if t.k == K::S { sx(o, t.w).min(sx(v[l], t.w)) as u64 } else { o.min(v[l]) }
                        } else if has("exch") {
                            v[l]
                        } else if has("or") {
                            o | v[l]
                        } else {
                            return Err(i.text.clone());
                        };
                        cell.copy_from_slice(&n.to_le_bytes()[..eb]);
                    }
                    if !red {
                        put!(&i.o[0], |l: usize| old[l])
                    }
                }
                "cp" => {
                    if has("commit_group") {
                        for l in 0..32 {
                            if mask >> l & 1 == 1 {
                                let c = std::mem::take(&mut w.cur[l]);
                                w.pend[l].push_back(c)
                            }
                        }
                    } else if has("wait_group") || has("wait_all") {
                        let n = if has("wait_all") { 0 } else { src!(0)[0] as usize };
                        for l in 0..32 {
                            if mask >> l & 1 == 0 {
                                continue;
                            }
                            while w.pend[l].len() > n {
                                for (d, s, sz, ssz) in w.pend[l].pop_front().unwrap() {
                                    let (d, sz, ssz) = (d as usize, sz as usize, ssz as usize);
                                    if ssz > 0 {
                                        let (bi, o) =
                                            ((s >> 36) as usize - 1, (s & ((1 << 36) - 1)) as usize);
                                        sm[d..d + ssz].copy_from_slice(&self.bufs[bi][o..o + ssz]);
                                    }
                                    sm[d + ssz..d + sz].fill(0);
                                    if self.check {
                                        self.shcheck(sh, d, sz as u32, w.id, ep, true, i);
                                    }
                                }
                            }
                        }
                    } else {
                        let (d, s) = match (&i.o[0], &i.o[1]) {
                            (Opnd::Mem(d, a), Opnd::Mem(s, b)) => (
                                (self.rd(w, d, &cta, &grid, &blk), *a),
                                (self.rd(w, s, &cta, &grid, &blk), *b),
                            ),
                            _ => return Err(i.text.clone()),
                        };
                        let sz = src!(2);
                        let ss = if i.o.len() > 3 { src!(3) } else { sz };
                        let mut sec = vec![];
                        for l in 0..32 {
                            if mask >> l & 1 == 0 {
                                continue;
                            }
                            let da = d.0[l].wrapping_add(d.1 as u64);
                            let da = if da >= SHARED_W { da - SHARED_W } else { da };
                            let sa = s.0[l].wrapping_add(s.1 as u64);
                            let n = sz[l] as u32;
                            if da % n as u64 != 0 || da as usize + n as usize > sm.len() {
                                self.problem(format!("line {}: cp.async shared address {da:#x}", i.line));
                                continue;
                            }
                            if ss[l] > 0 && self.gl(sa, n, i).is_none() {
                                continue;
                            }
                            sec.push(sa >> 5);
                            if self.check {
                                self.shcheck(sh, da as usize, n, w.id, ep, true, i);
                                for q in &mut sh[da as usize..da as usize + n as usize] {
                                    q.init = false
                                }
                            }
                            w.cur[l].push((da, sa, n, ss[l] as u32));
                            self.stats.gl_bytes += n as u64;
                        }
                        sec.sort_unstable();
                        sec.dedup();
                        self.stats.gl_sectors += sec.len() as u64;
                    }
                }
                "ldmatrix" => {
                    let v = if let Opnd::Vec(v) = &i.o[0] { v.clone() } else { vec![i.o[0].clone()] };
                    let (b, off) =
                        if let Opnd::Mem(b, o) = &i.o[1] { (b, *o) } else { return Err(i.text.clone()) };
                    let a = self.rd(w, b, &cta, &grid, &blk);
                    let tr = has("trans");
                    if mask != u32::MAX {
                        return Err(format!("ldmatrix with mask {mask:08x}"));
                    }
                    for (j, d) in v.iter().enumerate() {
                        let mut rows = [[0u16; 8]; 8];
                        let mut ad8 = [0u64; 32];
                        for r in 0..8 {
                            let ad = a[j * 8 + r].wrapping_add(off as u64);
                            let o = (if ad >= SHARED_W { ad - SHARED_W } else { ad }) as usize;
                            ad8[r] = o as u64;
                            if o % 16 != 0 || o + 16 > sm.len() {
                                self.problem(format!("line {}: ldmatrix address {o:#x}", i.line));
                                continue;
                            }
                            if self.check {
                                self.shcheck(sh, o, 16, w.id, ep, false, i);
                            }
                            for c in 0..8 {
                                rows[r][c] = u16::from_le_bytes([sm[o + 2 * c], sm[o + 2 * c + 1]])
                            }
                        }
                        self.banks(&ad8, 0xff, 16);
                        put!(d, |l: usize| {
                            let (r, c) = (l / 4, (l % 4) * 2);
                            if tr {
                                rows[c][r] as u64 | (rows[c + 1][r] as u64) << 16
                            } else {
                                rows[r][c] as u64 | (rows[r][c + 1] as u64) << 16
                            }
                        })
                    }
                }
                "mma" => {
                    self.stats.mma += 1;
                    let vv = |n: usize| -> Vec<R> {
                        if let Opnd::Vec(v) = &i.o[n] {
                            v.iter().map(|x| self.rd(w, x, &cta, &grid, &blk)).collect()
                        } else {
                            vec![]
                        }
                    };
                    let (ra, rb, rc) = (vv(1), vv(2), vv(3));
                    if !has("m16n8k16") || mask != u32::MAX {
                        return Err(i.text.clone());
                    }
                    let bf = has("bf16");
                    let g = |x: u64| -> f32 { if bf { bf2f(x & 0xffff) } else { h2f(x & 0xffff) } };
                    let mut a = [[0f32; 16]; 16];
                    let mut b = [[0f32; 16]; 8];
                    for l in 0..32 {
                        let (r, c) = (l / 4, (l % 4) * 2);
                        for (j, (dr, dc)) in [(0, 0), (8, 0), (0, 8), (8, 8)].iter().enumerate() {
                            a[r + dr][c + dc] = g(ra[j][l]);
                            a[r + dr][c + dc + 1] = g(ra[j][l] >> 16)
                        }
                        for (j, dk) in [0, 8].iter().enumerate() {
                            b[r][c + dk] = g(rb[j][l]);
                            b[r][c + dk + 1] = g(rb[j][l] >> 16)
                        }
                    }
                    let od = if let Opnd::Vec(v) = &i.o[0] { v.clone() } else { return Err(i.text.clone()) };
                    let mut d = [[0f32; 8]; 16];
                    for r in 0..16 {
                        for n in 0..8 {
                            let mut s = 0f32;
                            for q in 0..16 {
                                s += a[r][q] * b[n][q]
                            }
                            d[r][n] = s
                        }
                    }
                    for (j, o) in od.iter().enumerate() {
                        let (dr, dc) = ((j / 2) * 8, j % 2);
                        let c = rc[j];
                        put!(o, |l: usize| (d[l / 4 + dr][(l % 4) * 2 + dc] + f32::from_bits(c[l] as u32))
                            .to_bits() as u64)
                    }
                }
                _ => return Err(format!("line {}: unsupported instruction: {}", i.line, i.text)),
            }
        }
    }
    fn shcheck(&mut self, sh: &mut [Sh], o: usize, n: u32, wid: u32, ep: u32, st: bool, i: &Inst) {
        let mut race = None;
        let mut un = false;
        for b in &mut sh[o..o + n as usize] {
            let id = wid as u16;
            if st {
                if (b.we == ep && b.ww != id) || (b.re == ep && (b.rmulti || b.rw != id)) {
                    race =
                        Some(if b.we == ep && b.ww != id { "write after write" } else { "write after read" })
                }
                b.we = ep;
                b.ww = id;
                b.init = true
            } else {
                if b.we == ep && b.ww != id {
                    race = Some("read after write")
                }
                if !b.init {
                    un = true
                }
                if b.re == ep {
                    if b.rw != id {
                        b.rmulti = true
                    }
                } else {
                    b.re = ep;
                    b.rw = id;
                    b.rmulti = false
                }
            }
        }
        if let Some(r) = race {
            self.problem(format!(
                "line {}: shared race ({r} by another warp, no barrier between): {}",
                i.line, i.text
            ))
        }
        if un {
            self.problem(format!(
                "line {}: shared memory read before it is written or its cp.async is waited for: {}",
                i.line, i.text
            ))
        }
    }
    fn banks(&mut self, a: &R, mask: u32, n: u32) {
        self.stats.shared_acc += 1;
        let per = if n <= 4 {
            32
        } else if n == 8 {
            16
        } else {
            8
        };
        let ls: Vec<usize> = (0..32).filter(|&l| mask >> l & 1 == 1).collect();
        let mut fr = 0;
        let mut groups = 0;
        for ch in ls.chunks(per) {
            groups += 1;
            let mut words: Vec<u64> =
                ch.iter().flat_map(|&l| (0..(n.max(4) / 4) as u64).map(move |q| (a[l] >> 2) + q)).collect();
            words.sort_unstable();
            words.dedup();
            let mut c = [0u32; 32];
            for w in words {
                c[(w & 31) as usize] += 1
            }
            fr += *c.iter().max().unwrap()
        }
        self.stats.bank_extra += (fr - groups) as u64;
    }
}
