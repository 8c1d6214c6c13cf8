//! The documentation as a whole: every link of every page leads somewhere, and the book has every page. Each page has a
//! test of its own for what it says, beside the thing that it is about.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
};

use anyhow::{Result, ensure};
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What other pages can lead to, and where this one leads.
#[derive(Default)]
struct Page {
    anchors: BTreeSet<String>,
    links: Vec<String>,
}

impl Page {
    fn parse(text: &str) -> Self {
        let mut page = Self::default();
        let mut heading: Option<String> = None;
        for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => page.anchors.extend(heading.take().map(|text| anchor(&text))),
                Event::Text(text) | Event::Code(text) => heading.iter_mut().for_each(|heading| *heading += &text),
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.into_string());
                }
                _ => {}
            }
        }
        page
    }
}

/// The anchor of a heading, as both GitHub and mdBook make it.
fn anchor(heading: &str) -> String {
    let kept = |letter: char| match letter {
        ' ' => Some('-'),
        '-' | '_' => Some(letter),
        _ => letter.is_alphanumeric().then(|| letter.to_ascii_lowercase()),
    };
    heading.chars().filter_map(kept).collect()
}

/// The files below a folder that are ours, from the repository's root on.
fn files(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let is_made = name == "target" || name == "fuzz" || name.to_string_lossy().starts_with('.');
        if entry.file_type()?.is_dir() && !is_made {
            files(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path.strip_prefix(ROOT)?.to_owned());
        }
    }
    Ok(())
}

pub(crate) fn pages() -> Result<BTreeMap<PathBuf, String>> {
    let mut found = Vec::new();
    files(Path::new(ROOT), &mut found)?;
    found.into_iter().map(|path| Ok((path.clone(), fs::read_to_string(Path::new(ROOT).join(path))?))).collect()
}

/// The blocks of code of a page with their language.
pub(crate) fn blocks(page: &str) -> Vec<(String, String)> {
    let (mut blocks, mut is_in) = (Vec::<(String, String)>::new(), false);
    for event in Parser::new(page) {
        match event {
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language))) => {
                is_in = true;
                blocks.push((language.into_string(), String::new()));
            }
            Event::Text(text) if is_in => blocks.iter_mut().last().into_iter().for_each(|(_, block)| *block += &text),
            Event::End(TagEnd::CodeBlock) => is_in = false,
            _ => {}
        }
    }
    blocks
}

/// The path without `..`; none if it leaves the repository.
fn resolve(path: &Path) -> Option<PathBuf> {
    let mut resolved = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => resolved.pop().then_some(())?,
            Component::Normal(name) => resolved.push(name),
            _ => {}
        }
    }
    Some(resolved)
}

/// What is wrong with a link. Nothing is asked of the network.
fn fault(pages: &BTreeMap<PathBuf, Page>, from: &Path, link: &str) -> Option<String> {
    if let Some(rest) = link.strip_prefix("https://") {
        let is_host = |host: &str| host.contains('.') && !host.starts_with('.');
        let is_well = is_host(rest.split('/').next()?) && !link.contains(char::is_whitespace);
        return (!is_well).then(|| "is no address".into());
    }
    if link.contains(':') {
        return Some("is neither https nor a path".into());
    }
    let (path, fragment) = link.split_once('#').map_or((link, None), |(path, fragment)| (path, Some(fragment)));
    let path = if path.is_empty() { Some(from.to_owned()) } else { resolve(&from.parent()?.join(path)) };
    let Some(path) = path.filter(|path| Path::new(ROOT).join(path).exists() || pages.contains_key(path)) else {
        return Some("leads nowhere".into());
    };
    let fragment = fragment?;
    let has = pages.get(&path).is_some_and(|page| page.anchors.contains(fragment));
    (!has).then(|| format!("leads to no heading of {}", path.display()))
}

fn faults(texts: &BTreeMap<PathBuf, String>) -> Vec<String> {
    let pages: BTreeMap<_, _> = texts.iter().map(|(path, text)| (path.clone(), Page::parse(text))).collect();
    let links = pages.iter().flat_map(|(path, page)| page.links.iter().map(move |link| (path, link)));
    let faults = links.filter_map(|(path, link)| {
        fault(&pages, path, link).map(|fault| format!("{}: {link} {fault}", path.display()))
    });
    faults.collect()
}

#[test]
fn no_link_leads_nowhere() -> Result<()> {
    let texts = pages()?;
    let found = faults(&texts);
    ensure!(texts.len() > 30 && found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

#[test]
fn a_link_that_leads_nowhere_is_found() {
    let broken = [
        "no-such.md",
        "../../README.md",
        "reasons.md#no-such-heading",
        "#no-such-heading",
        "http://example.com/",
        "https://example",
        "https://",
        "ftp://example.com/x",
        "../no-such-folder/",
        "other.md#a-code-block",
    ];
    let good = [
        "reasons.md",
        "../README.md",
        "../config/operator.yaml",
        "#the-code-of-reason_x",
        "https://example.com/",
        "other.md",
    ];
    let mut page = "# The `code` of reason_x!\n".to_owned();
    for link in broken.iter().chain(&good) {
        page.extend(["\n[text](<", link, ">)\n"]);
    }
    page += "\n`[no link](no-such.md)`\n\n![an image](no-such.svg)\n";
    let other = "# Other\n\n```sh\n# A code block\n```\n".to_owned();
    let texts = BTreeMap::from([
        ("docs/page.md".into(), page),
        ("docs/other.md".into(), other),
        ("docs/reasons.md".into(), String::new()),
    ]);
    let found = faults(&texts);
    let expected = broken.iter().chain(&["no-such.svg"]).map(|link| format!("docs/page.md: {link} "));
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(&expected), "{found} instead of {expected}");
    }
    assert_eq!(found.len(), broken.len() + 1, "{found:#?}");
}

#[test]
fn the_book_has_every_page() -> Result<()> {
    let texts = pages()?;
    let summary = Path::new("docs/SUMMARY.md");
    let listed = Page::parse(&texts[summary]).links;
    let listed: BTreeSet<_> = listed.iter().filter_map(|link| resolve(&Path::new("docs").join(link))).collect();
    let missing: Vec<_> = texts.keys().filter(|path| *path != summary && !listed.contains(*path)).collect();
    let missing: Vec<_> = missing.iter().filter(|path| !path.starts_with("benches/src")).collect();
    ensure!(missing.is_empty(), "docs/SUMMARY.md leaves out {missing:?}");
    Ok(())
}
