//! Reads PTX (first cut).
#![allow(warnings, clippy::all, reason = "first cut, replaced next")]
use std::collections::HashMap;
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum K {
    P,
    B,
    U,
    S,
    F,
    BF,
}
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ty {
    pub k: K,
    pub w: u32,
    pub x2: bool,
}
pub fn ty(s: &str) -> Option<Ty> {
    let t = |k, w| Some(Ty { k, w, x2: false });
    match s {
        "pred" => t(K::P, 1),
        "b8" => t(K::B, 8),
        "b16" => t(K::B, 16),
        "b32" => t(K::B, 32),
        "b64" => t(K::B, 64),
        "u8" => t(K::U, 8),
        "u16" => t(K::U, 16),
        "u32" => t(K::U, 32),
        "u64" => t(K::U, 64),
        "s8" => t(K::S, 8),
        "s16" => t(K::S, 16),
        "s32" => t(K::S, 32),
        "s64" => t(K::S, 64),
        "f16" => t(K::F, 16),
        "f32" => t(K::F, 32),
        "f64" => t(K::F, 64),
        "bf16" => t(K::BF, 16),
        "bf16x2" => Some(Ty { k: K::BF, w: 32, x2: true }),
        "f16x2" => Some(Ty { k: K::F, w: 32, x2: true }),
        _ => None,
    }
}
#[derive(Clone, Debug, PartialEq)]
pub enum Opnd {
    Reg(u32),
    Imm(u64),
    FImm(f64),
    Sreg(u8),
    Mem(Box<Opnd>, i64),
    Vec(Vec<Opnd>),
    Label(usize),
    Sink,
}
#[derive(Clone, Debug)]
pub struct Inst {
    pub pred: Option<(u32, bool)>,
    pub op: String,
    pub m: Vec<String>,
    pub tys: Vec<Ty>,
    pub o: Vec<Opnd>,
    pub d2: Option<u32>,
    pub line: u32,
    pub text: String,
}
#[derive(Default, Clone, Debug)]
pub struct Kernel {
    pub name: String,
    pub params: Vec<(String, usize, usize)>,
    pub psize: usize,
    pub insts: Vec<Inst>,
    pub nregs: usize,
    pub smem: usize,
    pub regnames: Vec<String>,
}
#[derive(Default, Debug)]
pub struct Module {
    pub kernels: HashMap<String, Kernel>,
    pub consts: Vec<u8>,
}
pub const SHARED_W: u64 = 0x5000_0000_0000;
pub const CONST_W: u64 = 0x6000_0000_0000;
pub const SREGS: [&str; 18] = [
    "tid.x",
    "tid.y",
    "tid.z",
    "ntid.x",
    "ntid.y",
    "ntid.z",
    "ctaid.x",
    "ctaid.y",
    "ctaid.z",
    "nctaid.x",
    "nctaid.y",
    "nctaid.z",
    "laneid",
    "warpid",
    "lanemask_lt",
    "lanemask_le",
    "lanemask_gt",
    "lanemask_eq",
];
fn split(s: &str) -> Vec<String> {
    let (mut d, mut v, mut c) = (0, vec![], String::new());
    for ch in s.chars() {
        match ch {
            '[' | '{' | '(' => {
                d += 1;
                c.push(ch)
            }
            ']' | '}' | ')' => {
                d -= 1;
                c.push(ch)
            }
            ',' if d == 0 => {
                v.push(c.trim().to_string());
                c.clear()
            }
            _ => c.push(ch),
        }
    }
    if !c.trim().is_empty() {
        v.push(c.trim().to_string())
    }
    v
}
enum Tok {
    Stmt(String, u32),
    Open,
    Close,
    Label(String),
}
fn toks(body: &str) -> Vec<Tok> {
    // statements end with ';' or are .loc lines; braces inside an operand list stay in the statement
    let mut out = vec![];
    let mut cur = String::new();
    let mut line = 0u32;
    let mut depth = 0;
    for l in body.lines() {
        let l = l.split("//").next().unwrap();
        let t = l.trim();
        if t.starts_with(".loc") {
            line = t.split_whitespace().nth(2).and_then(|x| x.parse().ok()).unwrap_or(0);
            if let Some(i) = t.find("inlined_at") {
                let w: Vec<&str> = t[i..].split_whitespace().collect();
                if let Some(x) = w.get(2).and_then(|x| x.parse().ok()) {
                    line = x
                }
            }
            continue;
        }
        for ch in l.chars() {
            match ch {
                '{' if cur.trim().is_empty() => out.push(Tok::Open),
                '}' if depth == 0 && cur.trim().is_empty() => out.push(Tok::Close),
                '{' => {
                    depth += 1;
                    cur.push(ch)
                }
                '}' => {
                    depth -= 1;
                    cur.push(ch)
                }
                ';' => {
                    out.push(Tok::Stmt(cur.trim().to_string(), line));
                    cur.clear();
                }
                ':' if cur.trim().chars().all(|c| c.is_alphanumeric() || c == '_' || c == '$')
                    && !cur.trim().is_empty() =>
                {
                    out.push(Tok::Label(cur.trim().to_string()));
                    cur.clear();
                }
                _ => cur.push(ch),
            }
        }
        cur.push(' ');
    }
    out
}
fn bytes_decl(st: &str) -> Option<(String, usize, usize, Vec<u8>)> {
    // name,align,size,init
    let (l, init) = match st.split_once('=') {
        Some((a, b)) => (a, Some(b)),
        None => (st, None),
    };
    let w: Vec<&str> = l.split_whitespace().collect();
    let mut al = 1;
    let mut t = None;
    let mut i = 0;
    while i < w.len() {
        if w[i] == ".align" {
            al = w[i + 1].parse().ok()?;
            i += 1;
        } else if let Some(x) = w[i].strip_prefix('.').and_then(ty) {
            t = Some(x);
        }
        i += 1;
    }
    let t = t?;
    let last = w.last()?;
    let (nm, n) = match last.split_once('[') {
        Some((a, b)) => (a.to_string(), b.trim_end_matches(']').parse::<usize>().unwrap_or(0)),
        None => (last.to_string(), 1),
    };
    let eb = (t.w / 8) as usize;
    let mut v = vec![0u8; n * eb];
    if let Some(i) = init {
        let i = i.trim().trim_start_matches('{').trim_end_matches('}');
        for (k, x) in split(i).iter().enumerate() {
            let b = imm(x)?.to_le_bytes();
            v[k * eb..k * eb + eb].copy_from_slice(&b[..eb]);
        }
    }
    Some((nm, al.max(eb), n * eb, v))
}
fn imm(t: &str) -> Option<u64> {
    let t = t.trim_end_matches('U');
    let (n, s) = if let Some(x) = t.strip_prefix('-') { (true, x) } else { (false, t) };
    let v = if let Some(x) = s.strip_prefix("0f").or(s.strip_prefix("0F")) {
        u64::from_str_radix(x, 16).ok()?
    } else if let Some(x) = s.strip_prefix("0d").or(s.strip_prefix("0D")) {
        u64::from_str_radix(x, 16).ok()?
    } else if let Some(x) = s.strip_prefix("0x") {
        u64::from_str_radix(x, 16).ok()?
    } else {
        s.parse::<u64>().ok()?
    };
    Some(if n { (v as i64).wrapping_neg() as u64 } else { v })
}
pub fn module(src: &str) -> Result<Module, String> {
    let mut md = Module::default();
    let mut syms: HashMap<String, u64> = HashMap::new();
    let lines: Vec<&str> = src.lines().collect();
    let mut i = 0;
    let mut acc = String::new();
    while i < lines.len() {
        let t = lines[i].split("//").next().unwrap().trim();
        if t.contains(".entry") || t.contains(".func") {
            let name = t
                .split(".entry")
                .nth(1)
                .ok_or(".func not supported")?
                .split('(')
                .next()
                .unwrap()
                .trim()
                .to_string();
            let mut head = String::new();
            while !lines[i].trim().starts_with('{') {
                head.push_str(lines[i].split("//").next().unwrap());
                head.push(' ');
                i += 1;
            }
            let mut k = Kernel { name: name.clone(), ..Default::default() };
            let mut ksyms = syms.clone();
            if let (Some(a), Some(b)) = (head.find('('), head.rfind(')')) {
                for p in split(&head[a + 1..b]) {
                    let p = p.replace(".param", "");
                    let (n, al, sz, _) = bytes_decl(p.trim()).ok_or(format!("param {p}"))?;
                    let o = k.psize.div_ceil(al) * al;
                    k.params.push((n.clone(), o, sz));
                    ksyms.insert(n, o as u64);
                    k.psize = o + sz;
                }
            }
            let mut d = 0i32;
            let mut body = String::new();
            loop {
                let l = lines[i];
                let c = l.split("//").next().unwrap();
                for ch in c.chars() {
                    if ch == '{' {
                        d += 1
                    }
                    if ch == '}' {
                        d -= 1
                    }
                }
                body.push_str(l);
                body.push('\n');
                i += 1;
                if d == 0 {
                    break;
                }
            }
            let body = body.trim().strip_prefix('{').unwrap().rsplit_once('}').unwrap().0;
            parse_body(&mut k, body, &mut ksyms)?;
            md.kernels.insert(name, k);
            continue;
        }
        if t.starts_with(".version")
            || t.starts_with(".target")
            || t.starts_with(".address_size")
            || t.is_empty()
            || t.starts_with(".file")
            || t.starts_with(".loc")
        {
            i += 1;
            continue;
        }
        if t.starts_with(".section") {
            while i < lines.len() && !lines[i].trim().starts_with('}') {
                i += 1
            }
            i += 1;
            continue;
        }
        acc.push_str(t);
        acc.push(' ');
        if t.ends_with(';') {
            let st = acc.trim().trim_end_matches(';').trim().to_string();
            acc.clear();
            if st.contains(".const") || st.contains(".global") {
                let s2 = st
                    .replace(".const", "")
                    .replace(".global", "")
                    .replace(".visible", "")
                    .replace(".extern", "");
                let (n, al, _, v) = bytes_decl(s2.trim()).ok_or(format!("decl {st}"))?;
                while md.consts.len() % al != 0 {
                    md.consts.push(0)
                }
                syms.insert(n, CONST_W + md.consts.len() as u64);
                md.consts.extend(v);
            } else if st.contains(".shared") {
                let s2 = st.replace(".shared", "").replace(".extern", "");
                let (n, _, _, _) = bytes_decl(s2.trim()).ok_or(format!("decl {st}"))?;
                syms.insert(n, SHARED_W);
            }
        }
        i += 1;
    }
    Ok(md)
}
fn parse_body(k: &mut Kernel, body: &str, syms: &mut HashMap<String, u64>) -> Result<(), String> {
    let tk = toks(body);
    let mut labels = HashMap::new();
    let mut n = 0;
    for t in &tk {
        match t {
            Tok::Label(l) => {
                labels.insert(l.clone(), n);
            }
            Tok::Stmt(s, _) if !s.starts_with('.') && !s.is_empty() => n += 1,
            _ => {}
        }
    }
    let mut scopes: Vec<HashMap<String, u32>> = vec![HashMap::new()];
    let find = |sc: &Vec<HashMap<String, u32>>, n: &str| sc.iter().rev().find_map(|h| h.get(n).copied());
    fn opnd(
        t: &str,
        sc: &Vec<HashMap<String, u32>>,
        syms: &HashMap<String, u64>,
        labels: &HashMap<String, usize>,
    ) -> Result<Opnd, String> {
        let t = t.trim();
        if t == "_" {
            return Ok(Opnd::Sink);
        }
        if let Some(r) = sc.iter().rev().find_map(|h| h.get(t)) {
            return Ok(Opnd::Reg(*r));
        }
        if let Some(x) = t.strip_prefix('%') {
            if let Some(p) = SREGS.iter().position(|s| *s == x) {
                return Ok(Opnd::Sreg(p as u8));
            }
            return Err(format!("register {t}"));
        }
        if t.starts_with('{') {
            return Ok(Opnd::Vec(
                split(t.trim_start_matches('{').trim_end_matches('}'))
                    .iter()
                    .map(|x| opnd(x, sc, syms, labels))
                    .collect::<Result<_, _>>()?,
            ));
        }
        if t.starts_with('[') {
            let x = t.trim_start_matches('[').trim_end_matches(']').trim();
            let (b, off) = match x.find('+') {
                Some(p) => (x[..p].trim(), imm(x[p + 1..].trim()).ok_or(format!("offset {x}"))? as i64),
                None => (x, 0),
            };
            return Ok(Opnd::Mem(Box::new(opnd(b, sc, syms, labels)?), off));
        }
        if let Some(l) = labels.get(t) {
            return Ok(Opnd::Label(*l));
        }
        if let Some(a) = syms.get(t) {
            return Ok(Opnd::Imm(*a));
        }
        imm(t).map(Opnd::Imm).ok_or(format!("operand {t}"))
    }
    for t in tk {
        match t {
            Tok::Open => scopes.push(HashMap::new()),
            Tok::Close => {
                scopes.pop();
            }
            Tok::Label(_) => {}
            Tok::Stmt(s, line) => {
                if s.is_empty() {
                    continue;
                }
                if let Some(r) = s.strip_prefix(".reg") {
                    let (_, r) = r.trim().split_once(|c: char| c.is_whitespace()).ok_or("reg")?;
                    for nm in split(r) {
                        if let Some((a, b)) = nm.split_once('<') {
                            for j in 0..b.trim_end_matches('>').parse::<u32>().unwrap() {
                                let nn = format!("{a}{j}");
                                scopes.last_mut().unwrap().insert(nn.clone(), k.nregs as u32);
                                k.regnames.push(nn);
                                k.nregs += 1;
                            }
                        } else {
                            scopes.last_mut().unwrap().insert(nm.clone(), k.nregs as u32);
                            k.regnames.push(nm);
                            k.nregs += 1;
                        }
                    }
                    continue;
                }
                if s.starts_with(".shared") {
                    let (n, al, sz, _) =
                        bytes_decl(s.replacen(".shared", "", 1).trim()).ok_or("shared decl")?;
                    k.smem = k.smem.div_ceil(al) * al;
                    syms.insert(n, SHARED_W + k.smem as u64);
                    k.smem += sz;
                    continue;
                }
                if s.starts_with(".pragma") {
                    continue;
                }
                if s.starts_with('.') {
                    return Err(format!("directive {s}"));
                }
                let mut r = s.as_str();
                let mut pred = None;
                if let Some(x) = r.strip_prefix('@') {
                    let (p, rest) = x.split_once(|c: char| c.is_whitespace()).unwrap();
                    let neg = p.starts_with('!');
                    pred = Some((find(&scopes, p.trim_start_matches('!')).ok_or("pred")?, neg));
                    r = rest.trim();
                }
                let e = r.find(|c: char| c.is_whitespace()).unwrap_or(r.len());
                let opc = &r[..e];
                let mut m: Vec<String> = opc.split('.').map(|x| x.to_string()).collect();
                let op = m.remove(0);
                let mut parts = split(&r[e..]);
                let mut d2 = None;
                if let Some(p0) = parts.first().cloned() {
                    if let Some((a, b)) = p0.split_once('|') {
                        d2 = find(&scopes, b.trim());
                        parts[0] = a.trim().to_string();
                    }
                }
                let tys = m.iter().filter_map(|x| ty(x)).collect();
                let o = parts
                    .iter()
                    .map(|x| opnd(x, &scopes, syms, &labels))
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|e| format!("{e} in `{s}`"))?;
                k.insts.push(Inst { pred, op, m, tys, o, d2, line, text: s.clone() });
            }
        }
    }
    Ok(())
}
