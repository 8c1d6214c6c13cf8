//! Which tags of a repository are wanted, by rule: pattern, extract, exclude, semver, sort, limit, in this order. Pure.
//!
//! Patterns are read the same way by RE2, which the API server checks them with, and by the `regex` crate: what only one
//! of them knows is refused. Ranges have the grammar and the pre-release rule of node-semver.

use std::{cmp::Ordering, fmt};

use nodejs_semver::{Range, Version};
use regex::{Captures, Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

mod pattern;

use crate::oci::Tag;

/// Memory of one compiled pattern.
const MAX_PATTERN: usize = 1 << 20;

/// The rules as they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rules {
    /// Tags that match this regular expression from their beginning to their end.
    pub pattern: Option<String>,
    /// What of a tag is compared, made of the groups of the pattern, such as `$version`.
    pub extract: Option<String>,
    /// Tags that match one of these regular expressions are left out.
    pub exclude: Vec<String>,
    /// Tags that are versions in this range.
    pub semver: Option<String>,
    /// How tags are compared.
    pub sort_by: Option<SortBy>,
    /// So many, the highest first.
    pub limit: Option<usize>,
}

/// How tags are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "operator", derive(schemars::JsonSchema), schemars(description = ""))]
pub enum SortBy {
    /// As versions (semver.org); what is no version is left out.
    Semver,
    /// As text.
    Alphabetical,
    /// As decimal numbers; what is no number is left out.
    Numerical,
}

/// A rule that cannot be used, and the field that it stands in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {what}")]
pub struct RuleError {
    /// The field inside `select`.
    pub field: &'static str,
    /// What is wrong with it, and what to write.
    pub what: String,
}

/// Rules that can be used.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Rules", into = "Rules")]
pub struct Selection {
    rules: Rules,
    pattern: Option<Regex>,
    exclude: Vec<Regex>,
    range: Option<Range>,
}

/// A tag and what it is compared by.
struct Candidate<'a> {
    tag: &'a Tag,
    key: String,
    version: Option<Version>,
}

impl TryFrom<Rules> for Selection {
    type Error = RuleError;

    fn try_from(rules: Rules) -> Result<Self, RuleError> {
        let fail = |field, what: &str| Err(RuleError { field, what: what.to_owned() });
        if rules.pattern.is_none() && rules.semver.is_none() {
            return fail("select", "write a pattern or a semver range; all tags is pattern '.*'");
        }
        if rules.extract.is_some() && rules.pattern.is_none() {
            return fail("select.extract", "needs a pattern with the groups that it names");
        }
        if rules.semver.is_some() && rules.sort_by.is_some_and(|by| by != SortBy::Semver) {
            return fail("select.sortBy", "with semver only Semver");
        }
        if rules.limit.is_some() && rules.semver.is_none() && rules.sort_by.is_none() {
            return fail("select.limit", "needs sortBy, so that it is known which tags are the highest");
        }
        if rules.limit == Some(0) {
            return fail("select.limit", "write at least 1");
        }
        let pattern = rules.pattern.as_deref().map(|text| compile("select.pattern", text)).transpose()?;
        if let (Some(pattern), Some(extract)) = (&pattern, &rules.extract) {
            pattern::check_template(pattern, extract).map_err(|what| RuleError { field: "select.extract", what })?;
        }
        let exclude = rules.exclude.iter().map(|text| compile("select.exclude", text)).collect::<Result<_, _>>()?;
        let range = rules.semver.as_deref().map(range).transpose()?;
        Ok(Self { rules, pattern, exclude, range })
    }
}

impl From<Selection> for Rules {
    fn from(selection: Selection) -> Self {
        selection.rules
    }
}

impl fmt::Debug for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rules.fmt(f)
    }
}

impl PartialEq for Selection {
    fn eq(&self, other: &Self) -> bool {
        self.rules == other.rules
    }
}

impl Selection {
    /// The tags that are wanted: in the order of `sortBy`, the highest first, or as they were given where nothing is
    /// sorted. Tags that are made of a digest (`sha256-…`) are about other tags, and never wanted.
    #[must_use]
    pub fn choose<'a>(&self, tags: &'a [Tag]) -> Vec<&'a Tag> {
        let mut candidates: Vec<Candidate<'a>> = tags.iter().filter_map(|tag| self.candidate(tag)).collect();
        if let Some(by) = self.order() {
            candidates.sort_by(|a, b| compare(by, b, a));
        }
        candidates.truncate(self.rules.limit.unwrap_or(usize::MAX));
        candidates.into_iter().map(|candidate| candidate.tag).collect()
    }

    fn order(&self) -> Option<SortBy> {
        self.rules.sort_by.or(self.range.as_ref().map(|_| SortBy::Semver))
    }

    fn candidate<'a>(&self, tag: &'a Tag) -> Option<Candidate<'a>> {
        let text = tag.as_str();
        if is_about_a_digest(text) {
            return None;
        }
        let key = match &self.pattern {
            Some(pattern) => self.key(&pattern.captures(text)?)?,
            None => text.to_owned(),
        };
        if self.exclude.iter().any(|pattern| pattern.is_match(text)) {
            return None;
        }
        let version = match self.order() {
            Some(SortBy::Semver) => Some(version(&key)?),
            Some(SortBy::Numerical) if number(&key).is_none() => return None,
            _ => None,
        };
        let is_in_range =
            self.range.as_ref().is_none_or(|range| version.as_ref().is_some_and(|version| range.satisfies(version)));
        is_in_range.then_some(Candidate { tag, key, version })
    }

    /// What a tag that matched is compared by; nothing where the groups that are wanted matched nothing.
    fn key(&self, captures: &Captures<'_>) -> Option<String> {
        let Some(extract) = &self.rules.extract else { return Some(captures[0].to_owned()) };
        let mut key = String::new();
        captures.expand(extract, &mut key);
        (!key.is_empty()).then_some(key)
    }
}

/// `sha256-<hex>` and what is put under such tags: signatures, lists of referrers.
fn is_about_a_digest(tag: &str) -> bool {
    // The hexadecimal digits of a SHA-512 are cut where a tag may not be longer.
    let hex = tag.strip_prefix("sha256-").or(tag.strip_prefix("sha512-"));
    hex.is_some_and(|rest| rest.bytes().take_while(u8::is_ascii_hexdigit).count() >= 64)
}

fn compile(field: &'static str, text: &str) -> Result<Regex, RuleError> {
    let error = |what| RuleError { field, what };
    pattern::check(text).map_err(error)?;
    let anchored = format!(r"\A(?:{text})\z");
    RegexBuilder::new(&anchored).size_limit(MAX_PATTERN).build().map_err(|_| error(format!("{text:?} is too large")))
}

fn range(text: &str) -> Result<Range, RuleError> {
    Range::parse(text).map_err(|_| RuleError {
        field: "select.semver",
        what: format!("{text:?} is no range of versions, write for example '>=7.60 <8', '1.x' or '~1.4'"),
    })
}

/// A version out of a tag: without `v`, with parts that are missing as zero, and `_` read as the `+` that no tag can have.
fn version(text: &str) -> Option<Version> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let (text, build) = text.split_once(['+', '_']).map_or((text, None), |(text, build)| (text, Some(build)));
    let (core, pre) = text.split_once('-').map_or((text, None), |(core, pre)| (core, Some(pre)));
    let parts: Vec<&str> = core.split('.').collect();
    if parts.len() > 3 || !parts.iter().all(|part| is_part(part)) {
        return None;
    }
    let mut full = format!("{core}{}", &".0.0"[..2 * (3 - parts.len())]);
    for (mark, rest) in [('-', pre), ('+', build)] {
        if let Some(rest) = rest {
            full.push(mark);
            full.extend(rest.chars().map(|c| if c == '_' { '.' } else { c }));
        }
    }
    Version::parse(full).ok()
}

/// Digits without a leading zero (semver.org, 2).
fn is_part(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'))
}

/// A decimal number, of any length: its whole part without leading zeros, and its fraction without trailing ones.
fn number(text: &str) -> Option<(&str, &str)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    (is_digits(whole) && is_digits(fraction)).then(|| (whole.trim_start_matches('0'), fraction.trim_end_matches('0')))
}

/// What is equal by the rule is in the order of its text, so that the result does not depend on the order of the list.
fn compare(by: SortBy, a: &Candidate<'_>, b: &Candidate<'_>) -> Ordering {
    let order = match by {
        SortBy::Semver => a.version.cmp(&b.version),
        SortBy::Alphabetical => a.key.cmp(&b.key),
        SortBy::Numerical => number(&a.key).map(by_value).cmp(&number(&b.key).map(by_value)),
    };
    order.then_with(|| a.tag.as_str().cmp(b.tag.as_str()))
}

fn by_value<'a>((whole, fraction): (&'a str, &'a str)) -> (usize, &'a str, &'a str) {
    (whole.len(), whole, fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Result<Selection, String> {
        let rules: Rules = serde_json::from_str(text).unwrap();
        Selection::try_from(rules).map_err(|error| error.to_string())
    }

    fn chosen(text: &str, tags: &str) -> String {
        let tags: Vec<Tag> = tags.split_whitespace().map(|tag| tag.parse().unwrap()).collect();
        let selection = rules(text).unwrap();
        selection.choose(&tags).into_iter().map(Tag::as_str).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn rules_choose_tags() {
        let digest = format!("sha256-{}.sig", "a".repeat(64));
        for (rules, tags, expected) in [
            // Patterns match the whole tag, and keep the order of the list.
            (r#"{"pattern": "1\\.2"}"#, "1.2 11.2 1.23 1x2", "1.2"),
            (r#"{"pattern": "a|b"}"#, "b ab a", "b a"),
            (r#"{"pattern": "(?i)RC.*"}"#, "rc1 Rc2 arc", "rc1 Rc2"),
            (r#"{"pattern": ".*"}"#, &format!("latest {digest} sha256-abc"), "latest sha256-abc"),
            (r#"{"pattern": ".*", "exclude": [".*-rc.*", "latest"]}"#, "1 2-rc1 latest 3", "1 3"),
            // Ranges: missing parts, a v, builds, and pre-releases as node-semver has them.
            (
                r#"{"semver": ">=7.60 <8"}"#,
                "7.59.0 7.60.0 v7.61 7.70.1 8.0.0 8.0.0-rc1 7 latest",
                "7.70.1 v7.61 7.60.0",
            ),
            (r#"{"semver": "1.x"}"#, "1 1.0 1.9.9 2 0.9", "1.9.9 1.0 1"),
            (r#"{"semver": "^1.2.3"}"#, "1.2.2 1.2.3 1.9 2.0.0", "1.9 1.2.3"),
            (r#"{"semver": "~1.4"}"#, "1.4.0 1.4.9 1.5.0", "1.4.9 1.4.0"),
            (r#"{"semver": "1.0 - 2.0"}"#, "0.9 1.0 1.5 2.0 2.1", "2.0 1.5 1.0"),
            (r#"{"semver": "<1 || >=3"}"#, "0.9 1.0 3.1", "3.1 0.9"),
            (r#"{"semver": "*"}"#, "1.0.0-rc.1 1.0.0", "1.0.0"),
            (r#"{"semver": ">=1.0.0-0"}"#, "1.0.0-rc.1 1.0.0 1.1.0-rc.1", "1.0.0 1.0.0-rc.1"),
            (r#"{"semver": ">=1.0.0-rc.2 <1.0.1"}"#, "1.0.0-rc.1 1.0.0-rc.10 1.0.0-rc.9", "1.0.0-rc.10 1.0.0-rc.9"),
            (r#"{"semver": "1.2.x"}"#, "1.2.3_build.7 1.2.4-alpine 1.2.5", "1.2.5 1.2.3_build.7"),
            (r#"{"semver": "*"}"#, "2024.01.02 1.2.3.4 v1 1.a", "v1"),
            // The part that is compared.
            (
                r#"{"pattern": "(?P<version>.+)-alpine", "extract": "$version", "semver": "1.x"}"#,
                "1.2-alpine 1.10-alpine 1.3 2.0-alpine",
                "1.10-alpine 1.2-alpine",
            ),
            (
                r#"{"pattern": "main-[0-9a-f]+-([0-9]+)", "extract": "$1", "sortBy": "Numerical", "limit": 1}"#,
                "main-abc-9 main-def-10 main-0-2",
                "main-def-10",
            ),
            (r#"{"pattern": "(?:a-(?P<n>[0-9]+)|b)", "extract": "$n", "sortBy": "Numerical"}"#, "b a-1", "a-1"),
            // Sorting, the highest first.
            (r#"{"pattern": ".*", "sortBy": "Semver", "limit": 2}"#, "1.9 1.10 1.2 latest 1.10-rc1", "1.10 1.10-rc1"),
            (r#"{"pattern": ".*", "sortBy": "Alphabetical", "limit": 2}"#, "b c a", "c b"),
            (
                r#"{"pattern": ".*", "sortBy": "Numerical"}"#,
                "9 10 010 1.5 1.25 x 99999999999999999999999 0",
                "99999999999999999999999 10 010 9 1.5 1.25 0",
            ),
            (r#"{"semver": "1.x", "limit": 1}"#, "1.0 v1.0.0 1.0.0", "v1.0.0"),
            (r#"{"semver": "9.x"}"#, "1.0", ""),
        ] {
            assert_eq!(chosen(rules, tags), expected, "{rules}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_field() {
        for (text, expected) in [
            ("{}", "select: write a pattern or a semver range"),
            (r#"{"sortBy": "Alphabetical", "limit": 1}"#, "select: write a pattern or a semver range"),
            (r#"{"pattern": "a("}"#, "select.pattern: \"a(\" is no regular expression"),
            (r#"{"pattern": "a)(b"}"#, "select.pattern"),
            (r#"{"pattern": ".*", "exclude": ["["]}"#, "select.exclude"),
            (r#"{"pattern": "(?:(?:(?:a{1000}){1000}){1000})"}"#, "is too large"),
            (r#"{"semver": "1.x", "extract": "$1"}"#, "select.extract: needs a pattern"),
            (r#"{"pattern": "a(b)", "extract": "$2"}"#, "select.extract: the pattern has no group \"2\""),
            (r#"{"pattern": "a(b)", "extract": "${version}"}"#, "has no group \"version\""),
            (r#"{"pattern": "a(b)", "extract": "b"}"#, "select.extract: names no group"),
            (r#"{"semver": "newest"}"#, "select.semver: \"newest\" is no range"),
            (r#"{"semver": "1.x", "sortBy": "Alphabetical"}"#, "select.sortBy"),
            (r#"{"pattern": "a", "limit": 1}"#, "select.limit: needs sortBy"),
            (r#"{"pattern": "a", "sortBy": "Semver", "limit": 0}"#, "select.limit: write at least 1"),
        ] {
            let error = rules(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn the_order_of_the_list_decides_nothing_where_tags_are_sorted() {
        let tags = "1.0 v1.0 1.0.0 2.1 2.0-rc1 1.5_2 1.5_1";
        let backwards = tags.split(' ').rev().collect::<Vec<_>>().join(" ");
        for by in ["Semver", "Alphabetical"] {
            let rules = format!(r#"{{"pattern": ".*", "sortBy": "{by}"}}"#);
            assert_eq!(chosen(&rules, tags), chosen(&rules, &backwards), "{by}");
        }
    }
}
