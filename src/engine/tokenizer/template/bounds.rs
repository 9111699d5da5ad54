//! The size limit of a rendering. Fuel counts steps, but a string that is joined to itself doubles at every step;
//! so every operator, filter and literal of a template that can make a value larger than its parts is wrapped in
//! a filter that measures what came out. Knows the template's syntax tree and sizes; nothing of messages.
//!
//! ```text
//! {{ a ~ b }}      becomes  {{ ((a ~ b)|__bounded) }}
//! {{ a|join(b) }}  becomes  {{ a|join(b)|__bounded }}
//! ```
//! No line break is added, so errors still name the template's own lines. What is written, also into captured
//! blocks, is counted where it is formatted.

use std::cell::Cell;

use minijinja::machinery::ast::{BinOpKind, Call, CallArg, Expr, Stmt};
use minijinja::machinery::{Span, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Name of the filter that measures.
pub(super) const FILTER: &str = "__bounded";
/// Bytes of one value, and of the whole text.
pub(super) const VALUE_BYTES_MAX: usize = 16 << 20;
/// Bytes of all values made and texts written in one rendering.
const WORK_BYTES_MAX: usize = 256 << 20;
/// Members looked at in one list or map, over all its depth.
const MEMBERS_MAX: usize = 100_000;
const DEPTH_MAX: usize = 64;
/// Real templates have at most 20 KB.
pub(super) const SOURCE_BYTES_MAX: usize = 1 << 20;

thread_local! {
    /// Bytes made so far in this thread's rendering.
    static WORK: Cell<usize> = const { Cell::new(0) };
}

/// Begins a rendering in this thread.
pub(super) fn begin() {
    WORK.set(0);
}

/// Counts bytes made.
pub(super) fn count(bytes: usize) -> Result<(), Error> {
    let work = WORK.get().saturating_add(bytes);
    WORK.set(work);
    if bytes > VALUE_BYTES_MAX || work > WORK_BYTES_MAX { Err(too_large()) } else { Ok(()) }
}

pub(super) fn too_large() -> Error {
    let detail = format!(
        "it makes a text larger than {} MiB; hint: the template repeats itself without end",
        VALUE_BYTES_MAX >> 20
    );
    Error::new(ErrorKind::InvalidOperation, detail)
}

/// The filter: the value itself, if it is not too large or too deep.
pub(super) fn bounded(value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        // Small strings cost less than the step that made them.
        return count(text.len()).map(|()| value);
    }
    let mut members = 0;
    measure(&value, 0, &mut members)?;
    count(members).map(|()| value)
}

fn measure(value: &Value, depth: usize, members: &mut usize) -> Result<(), Error> {
    *members += 1;
    if *members > MEMBERS_MAX || depth > DEPTH_MAX {
        return Err(too_large());
    }
    match value.kind() {
        ValueKind::Seq => value.try_iter()?.try_for_each(|member| measure(&member, depth + 1, members)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            let member = value.get_item(&key)?;
            measure(&member, depth + 1, members)
        }),
        _ => Ok(()),
    }
}

/// A template with the filter in place.
pub(super) struct Wrapped {
    pub(super) source: String,
    /// Bytes of the longest text between tags.
    pub(super) longest_text: usize,
}

/// Wraps what can grow.
pub(super) fn wrap(source: &str, name: &str, syntax: SyntaxConfig) -> Result<Wrapped, Error> {
    if source.len() > SOURCE_BYTES_MAX {
        let detail = format!("it has {} bytes, more than the limit of {SOURCE_BYTES_MAX}", source.len());
        return Err(Error::new(ErrorKind::SyntaxError, detail));
    }
    let mut walk = Walk { source, inserts: Vec::new(), longest_text: 0 };
    walk.statement(&parse(source, name, syntax)?)?;
    let Walk { mut inserts, longest_text, .. } = walk;
    // At one place, an inner end comes before an outer end, and ends come before beginnings.
    inserts.sort_by_key(|(at, what)| (*at, *what == OPEN));
    let mut out = String::with_capacity(source.len() + inserts.len() * CLOSE.len());
    let mut from = 0;
    for (at, what) in inserts {
        out.push_str(&source[from..at]);
        out.push_str(what);
        from = at;
    }
    out.push_str(&source[from..]);
    Ok(Wrapped { source: out, longest_text })
}

const OPEN: &str = "((";
const CLOSE: &str = ")|__bounded)";
const SUFFIX: &str = "|__bounded";

struct Walk<'source> {
    source: &'source str,
    inserts: Vec<(usize, &'static str)>,
    longest_text: usize,
}

impl Walk<'_> {
    fn around(&mut self, span: Span) {
        self.inserts.push((span.start_offset as usize, OPEN));
        self.inserts.push((span.end_offset as usize, CLOSE));
    }

    fn statements(&mut self, statements: &[Stmt<'_>]) -> Result<(), Error> {
        statements.iter().try_for_each(|statement| self.statement(statement))
    }

    fn statement(&mut self, statement: &Stmt<'_>) -> Result<(), Error> {
        match statement {
            Stmt::Template(node) => self.statements(&node.children),
            Stmt::EmitExpr(node) => self.expression(&node.expr),
            Stmt::EmitRaw(node) => {
                self.longest_text = self.longest_text.max(node.raw.len());
                Ok(())
            }
            Stmt::ForLoop(node) => {
                self.expression(&node.iter)?;
                self.optional(node.filter_expr.as_ref())?;
                self.statements(&node.body)?;
                self.statements(&node.else_body)
            }
            Stmt::IfCond(node) => {
                self.expression(&node.expr)?;
                self.statements(&node.true_body)?;
                self.statements(&node.false_body)
            }
            Stmt::WithBlock(node) => {
                node.assignments.iter().try_for_each(|(_, value)| self.expression(value))?;
                self.statements(&node.body)
            }
            Stmt::Set(node) => self.expression(&node.expr),
            Stmt::SetBlock(node) => {
                self.optional(node.filter.as_ref())?;
                self.statements(&node.body)
            }
            Stmt::AutoEscape(node) => self.statements(&node.body),
            Stmt::FilterBlock(node) => self.statements(&node.body),
            Stmt::Macro(node) => {
                node.defaults.iter().try_for_each(|value| self.expression(value))?;
                self.statements(&node.body)
            }
            Stmt::CallBlock(node) => {
                self.call(&node.call)?;
                self.statements(&node.macro_decl.body)
            }
            Stmt::Do(node) => self.call(&node.call),
            Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
            Stmt::Block(_) | Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {
                let detail =
                    "it uses `block`, `import`, `extends` or `include`, which chat templates have not";
                Err(Error::new(ErrorKind::SyntaxError, detail))
            }
        }
    }

    fn optional(&mut self, expression: Option<&Expr<'_>>) -> Result<(), Error> {
        expression.map_or(Ok(()), |expression| self.expression(expression))
    }

    fn call(&mut self, call: &Call<'_>) -> Result<(), Error> {
        self.expression(&call.expr)?;
        self.arguments(&call.args)
    }

    fn arguments(&mut self, arguments: &[CallArg<'_>]) -> Result<(), Error> {
        arguments.iter().try_for_each(|argument| match argument {
            CallArg::Pos(value)
            | CallArg::Kwarg(_, value)
            | CallArg::PosSplat(value)
            | CallArg::KwargSplat(value) => self.expression(value),
        })
    }

    fn expression(&mut self, expression: &Expr<'_>) -> Result<(), Error> {
        match expression {
            Expr::Var(_) | Expr::Const(_) => Ok(()),
            Expr::Slice(node) => {
                self.expression(&node.expr)?;
                [&node.start, &node.stop, &node.step]
                    .into_iter()
                    .try_for_each(|part| self.optional(part.as_ref()))
            }
            Expr::UnaryOp(node) => self.expression(&node.expr),
            Expr::BinOp(node) => {
                self.expression(&node.left)?;
                self.expression(&node.right)?;
                if matches!(node.op, BinOpKind::Add | BinOpKind::Mul | BinOpKind::Concat) {
                    // The compiler works constants out, so these never meet the filter.
                    expression.as_const().map_or(Ok(()), |value| bounded(value).map(|_| ()))?;
                    self.around(node.span());
                }
                Ok(())
            }
            Expr::Compare(node) => {
                self.expression(&node.expr)?;
                node.ops.iter().try_for_each(|op| self.expression(&op.expr))
            }
            Expr::IfExpr(node) => {
                self.expression(&node.test_expr)?;
                self.expression(&node.true_expr)?;
                self.optional(node.false_expr.as_ref())
            }
            Expr::Filter(node) => {
                self.optional(node.expr.as_ref())?;
                self.arguments(&node.args)?;
                if node.expr.is_some() {
                    self.inserts.push((node.span().end_offset as usize, SUFFIX));
                }
                Ok(())
            }
            Expr::Test(node) => {
                self.expression(&node.expr)?;
                self.arguments(&node.args)
            }
            Expr::GetAttr(node) => self.expression(&node.expr),
            Expr::GetItem(node) => {
                self.expression(&node.expr)?;
                self.expression(&node.subscript_expr)
            }
            Expr::Call(node) => self.call(node),
            Expr::List(node) => {
                node.items.iter().try_for_each(|item| self.expression(item))?;
                self.around(node.span());
                Ok(())
            }
            Expr::Tuple(node) => {
                node.items.iter().try_for_each(|item| self.expression(item))?;
                if self.source[node.span().start_offset as usize..].starts_with('(') {
                    self.around(node.span());
                }
                Ok(())
            }
            Expr::Map(node) => {
                node.keys.iter().chain(&node.values).try_for_each(|item| self.expression(item))?;
                self.around(node.span());
                Ok(())
            }
        }
    }
}
