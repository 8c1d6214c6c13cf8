//! Regular expressions that RE2 and the `regex` crate read the same way, and the templates that name their groups.

use regex::Regex;
use regex_syntax::ast::{
    AssertionKind, Ast, ClassSetBinaryOp, ClassSetItem, ClassUnicodeKind, Flag, Flags, FlagsItemKind, HexLiteralKind,
    LiteralKind, RepetitionKind, RepetitionRange, Visitor, parse::Parser, visit,
};

/// RE2 repeats no more often.
const MAX_REPEAT: u32 = 1000;

/// Whether `text` is a regular expression that both know.
pub(super) fn check(text: &str) -> Result<(), String> {
    let ast = Parser::new().parse(text);
    let ast = ast.map_err(|error| format!("{text:?} is no regular expression: {}", error.kind()))?;
    visit(&ast, Common).map_err(|what| format!("{text:?} is not understood everywhere: {what} are not in RE2"))
}

/// Whether every group that a template names is one of the pattern's, and there is one.
pub(super) fn check_template(pattern: &Regex, template: &str) -> Result<(), String> {
    let groups: Vec<&str> = groups(template).collect();
    if groups.is_empty() {
        return Err("names no group of the pattern, write for example '$version' or '$1'".to_owned());
    }
    let exists = |group: &&str| match group.parse::<usize>() {
        Ok(number) => number < pattern.captures_len(),
        Err(_) => pattern.capture_names().flatten().any(|name| name == *group),
    };
    match groups.into_iter().find(|group| !exists(group)) {
        Some(missing) => Err(format!("the pattern has no group {missing:?}")),
        None => Ok(()),
    }
}

/// What follows each `$`: a word, or what stands in braces. `$$` is a dollar.
fn groups(template: &str) -> impl Iterator<Item = &str> {
    let mut rest = template;
    std::iter::from_fn(move || {
        loop {
            let (_, after) = rest.split_once('$')?;
            if let Some(after) = after.strip_prefix('$') {
                rest = after;
                continue;
            }
            let (group, after) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
                Some(found) => found,
                None => {
                    let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                    after.split_at(end)
                }
            };
            rest = after;
            return Some(group);
        }
    })
}

/// Fails with what only the `regex` crate knows.
struct Common;

impl Visitor for Common {
    type Output = ();
    type Err = &'static str;

    fn finish(self) -> Result<(), Self::Err> {
        Ok(())
    }

    fn visit_pre(&mut self, ast: &Ast) -> Result<(), Self::Err> {
        match ast {
            Ast::Flags(set) => flags(&set.flags),
            Ast::Group(group) => group.flags().map_or(Ok(()), flags),
            Ast::Assertion(assertion) => match assertion.kind {
                AssertionKind::StartLine
                | AssertionKind::EndLine
                | AssertionKind::StartText
                | AssertionKind::EndText
                | AssertionKind::WordBoundary
                | AssertionKind::NotWordBoundary => Ok(()),
                _ => Err("the halves of word boundaries"),
            },
            Ast::Literal(literal) => literal_kind(&literal.kind),
            Ast::ClassUnicode(class) => unicode(&class.kind),
            Ast::Repetition(repetition) => match &repetition.op.kind {
                RepetitionKind::Range(
                    RepetitionRange::Exactly(most) | RepetitionRange::AtLeast(most) | RepetitionRange::Bounded(_, most),
                ) if *most > MAX_REPEAT => Err("more than 1000 repetitions"),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn visit_class_set_item_pre(&mut self, item: &ClassSetItem) -> Result<(), Self::Err> {
        match item {
            ClassSetItem::Bracketed(_) => Err("classes inside classes"),
            ClassSetItem::Literal(literal) => literal_kind(&literal.kind),
            ClassSetItem::Unicode(class) => unicode(&class.kind),
            _ => Ok(()),
        }
    }

    fn visit_class_set_binary_op_pre(&mut self, _: &ClassSetBinaryOp) -> Result<(), Self::Err> {
        Err("operations between classes")
    }
}

fn flags(flags: &Flags) -> Result<(), &'static str> {
    let is_common = |kind: &FlagsItemKind| match kind {
        FlagsItemKind::Negation => true,
        FlagsItemKind::Flag(flag) => {
            matches!(flag, Flag::CaseInsensitive | Flag::MultiLine | Flag::DotMatchesNewLine | Flag::SwapGreed)
        }
    };
    if flags.items.iter().all(|item| is_common(&item.kind)) { Ok(()) } else { Err("flags other than i, m, s and U") }
}

fn literal_kind(kind: &LiteralKind) -> Result<(), &'static str> {
    match kind {
        LiteralKind::HexFixed(kind) | LiteralKind::HexBrace(kind) if *kind != HexLiteralKind::X => {
            Err("the escapes \\u and \\U")
        }
        _ => Ok(()),
    }
}

fn unicode(kind: &ClassUnicodeKind) -> Result<(), &'static str> {
    match kind {
        ClassUnicodeKind::NamedValue { .. } => Err("properties with a value"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_one_engine_knows_is_refused() {
        for text in [
            r"v?\d+\.\d+",
            r"(?P<a>x)|(?i:y)",
            r"[[:alpha:]\d-]+",
            r"\pN\p{Greek}",
            r"a{1,1000}?",
            r"\x41\x{41}",
            r"^a\b$",
            "(?sU)a.*",
            "",
        ] {
            assert_eq!(check(text), Ok(()), "{text}");
        }
        for (text, what) in [
            ("(?x) a # b", "flags"),
            ("(?R)a", "flags"),
            ("[a-z&&[^b]]", "operations between classes"),
            ("[a[b]]", "classes inside classes"),
            (r"\u0041", "escapes"),
            (r"\b{start}a", "word boundaries"),
            (r"\p{sc=Greek}", "properties"),
            ("a{1001}", "repetitions"),
            ("a{,5}", "no regular expression"),
            (r"\Qa\E", "no regular expression"),
            ("(?=a)", "no regular expression"),
            (r"(a)\1", "no regular expression"),
        ] {
            let error = check(text).unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
