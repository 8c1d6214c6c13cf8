//! What it costs to find that a tag is there, where many are wanted, and where a digest is pinned.

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use imagemirror::{
    copy::Referrers,
    plan::Action,
    registry::{Error, Repository, Source, TagList},
};
use serde_json::{Value, json};
use testenv::{
    Env, Image, Proxy, Trap,
    proxy::{Action as Do, Matcher, Route},
    registry::Kind::{Distribution, Olareg},
};

use crate::direct::{Direct, client_of, prefix, server};

/// So many tags of one repository into another one.
fn tags(name: &str, to: &str, count: usize) -> Result<Direct> {
    let mut copy: Option<Direct> = None;
    for tag in 0..count {
        let (from, to) = (format!("{name}:{tag}"), format!("{to}:{tag}"));
        copy = Some(match copy {
            None => Direct::of(&from, &to),
            Some(copy) => copy.and(&from, &to),
        });
    }
    Ok(copy.context("no tags")?.referrers(Referrers::None))
}

#[tokio::test]
async fn more_than_eight_tags_of_a_new_repository_are_looked_up_in_one_list() -> Result<()> {
    let (env, name) = (Env::get(), prefix("tags"));
    let target = server(Distribution).await?;
    let images: Vec<Image> = (0..12).map(|number| Image::single(400 + number, &[300])).collect();
    for (tag, image) in images.iter().enumerate() {
        client_of(&env.open)?.push(&name, &tag.to_string(), image).await?;
    }
    let at_target = client_of(target.registry())?;
    let head = Matcher::new().method("HEAD").route(Route::Manifest);
    let list = Matcher::new().method("GET").route(Route::Tags);
    for (case, wanted, there, heads, lists) in [
        ("new", 12, &[][..], 1, 1),
        // Those in the list are asked for; the others are not.
        ("some", 12, &[5, 7][..], 3, 1),
        // The first is there: so may be the rest.
        ("known", 12, &[0][..], 12, 0),
        ("few", 8, &[][..], 8, 0),
    ] {
        for tag in there {
            at_target.push(case, &tag.to_string(), &images[*tag]).await?;
        }
        let proxy = Proxy::to(env, target.registry()).start().await?;
        if case == "known" {
            // Which one is asked for first is chance: all are there.
            for (tag, image) in images.iter().enumerate() {
                at_target.push(case, &tag.to_string(), image).await?;
            }
        }
        tags(&name, case, wanted)?.done(&env.open, proxy.registry()).await.context(case)?;
        let found = (proxy.count(&head), proxy.count(&list));
        ensure!(found == (heads, lists), "{case}: {found:?}: {:#?}", proxy.requests());
        for (tag, image) in images.iter().enumerate().take(wanted) {
            ensure!(at_target.holds(case, &tag.to_string(), image).await?, "{case} {tag}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn tags_that_cannot_be_listed_are_asked_for_one_by_one() -> Result<()> {
    let (env, name) = (Env::get(), prefix("tags-denied"));
    let target = server(Distribution).await?;
    let image = Image::single(420, &[300]);
    for tag in 0..10 {
        client_of(&env.open)?.push(&name, &tag.to_string(), &image).await?;
    }
    for (case, answer) in
        [("denied", Do::respond(403)), ("unknown", Do::respond(405)), ("odd", Do::respond(200).body("[]"))]
    {
        let proxy = Proxy::to(env, target.registry()).start().await?;
        proxy.rule(Matcher::new().route(Route::Tags), answer);
        tags(&name, case, 10)?.done(&env.open, proxy.registry()).await.context(case)?;
        let heads = proxy.count(&Matcher::new().method("HEAD").route(Route::Manifest));
        ensure!(heads == 10, "{case}: {heads}");
    }
    Ok(())
}

/// The tags of a repository whose registry answers with these pages, each with a `Link` to what comes next, as far as they
/// are read; and how often it was asked.
async fn listed(pages: Vec<(impl Into<Bytes>, &str)>, max_pages: usize) -> Result<(Result<TagList, Error>, usize)> {
    let (env, list) = (Env::get(), Matcher::new().route(Route::Tags));
    let proxy = Proxy::to(env, &env.open).start().await?;
    for (body, next) in pages {
        let mut page = Do::respond(200).body(body);
        if !next.is_empty() {
            page = page.header("Link", &format!("<{next}>; rel=\"next\""));
        }
        proxy.rule(list.clone().times(1), page);
    }
    proxy.rule(list.clone(), Do::respond(500));
    let access = crate::cases::access(env, proxy.registry())?;
    let repository = Repository::for_pull(&crate::cases::client(), &access, "a".parse()?)?;
    let tags = Source::Registry(repository).tags(max_pages).await;
    Ok((tags, proxy.count(&list)))
}

#[tokio::test]
async fn a_list_of_tags_is_read_as_far_as_it_makes_sense() -> Result<()> {
    let other = Trap::start(Env::get(), false).await?;
    let page = |tags: Value| json!({ "name": "a", "tags": tags }).to_string();
    let (none, one, long) = (page(json!(null)), page(json!(["1"])), "x".repeat(129));
    let odd = page(json!(["b", "", "a b", "../x", "-x", long, null, 7, ["c"], {}, "a"]));
    let many = page((0..60_000).map(|number| number.to_string()).collect());
    let blank = |len: usize| format!("{}{}", " ".repeat(len), one);
    // What is found: the tags, whether these are all, and how many are none.
    let found = |tags: &[&str], is_complete, malformed| {
        let tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
        Some((tags, is_complete, malformed))
    };
    for (case, pages, max_pages, asked, expected) in [
        ("null", vec![(none, "")], 9, 1, found(&[], true, 0)),
        ("none", vec![("{}".to_owned(), "")], 9, 1, found(&[], true, 0)),
        ("odd", vec![(odd, "")], 9, 1, found(&["b", "a"], true, 9)),
        ("pages", vec![(one.clone(), "?p=2"), (page(json!(["0"])), "")], 9, 2, found(&["1", "0"], true, 0)),
        ("short of them", vec![(one.clone(), "?p=2"), (one.clone(), "?p=3")], 2, 2, found(&["1", "1"], false, 0)),
        ("the same page", vec![(one.clone(), "?p=2"), (one.clone(), "?p=2")], 9, 2, None),
        ("back to the first", vec![(one.clone(), "?p=2"), (one.clone(), "list?n=1000")], 9, 2, None),
        ("elsewhere", vec![(one.clone(), &*other.url())], 9, 1, None),
        ("a page that is large", vec![(blank(3 << 20), "")], 9, 1, found(&["1"], true, 0)),
        ("a page that is too large", vec![(blank(4 << 20), "")], 9, 1, None),
        ("no list", vec![("[]".to_owned(), "")], 9, 1, None),
    ] {
        let (list, count) = listed(pages, max_pages).await?;
        ensure!(count == asked, "{case}: {count}");
        match (list, expected) {
            (Ok(list), Some(expected)) => {
                let tags: Vec<String> = list.tags.iter().map(ToString::to_string).collect();
                ensure!(
                    (&tags, list.is_complete, list.malformed) == (&expected.0, expected.1, expected.2),
                    "{case}: {tags:?}"
                );
            }
            (Err(error), None) => ensure!(!error.is_retryable(), "{case}: {error}"),
            (list, _) => bail!("{case}: {list:?}"),
        }
    }
    ensure!(other.connections() == 0, "the other host was asked");

    // Nobody has so many, and a list that does not end takes no more memory than one that does.
    for (case, page, most) in [("tags", many, 2), ("bytes", blank(3 << 20), 2)] {
        let pages: Vec<_> = (0..9).map(|number| (page.clone(), format!("?p={number}"))).collect();
        let pages = pages.iter().map(|(page, next)| (page.clone(), next.as_str())).collect();
        let (list, count) = listed(pages, 1000).await?;
        ensure!(!list?.is_complete && count == most, "{case}: {count} pages were read");
    }
    Ok(())
}

#[tokio::test]
async fn a_pinned_sha512_digest_is_followed_and_costs_nothing_the_second_time() -> Result<()> {
    let source = server(Olareg).await?;
    let mut image = Image::single(430, &[300]);
    image.root = image.root.with_sha512();
    client_of(source.registry())?.push("a", image.digest(), &image).await?;
    let from = Proxy::to(Env::get(), source.registry()).start().await?;
    for kind in [Distribution, Olareg] {
        let target = server(kind).await?;
        let pinned = || Direct::of(&format!("a@{}", image.digest()), "a:pinned").referrers(Referrers::None);
        let report = pinned().done(from.registry(), target.registry()).await.with_context(|| format!("{kind:?}"))?;
        ensure!(client_of(target.registry())?.holds("a", "pinned", &image).await?, "{kind:?}");
        let digest = report.images[0].digest.as_ref().map(ToString::to_string);
        ensure!(digest.as_deref() == Some(image.digest()), "{kind:?}: {digest:?}");
        from.forget();
        for again in [pinned(), pinned().after(&report)] {
            let report = again.done(from.registry(), target.registry()).await?;
            ensure!(report.images[0].action == Some(Action::Unchanged), "{kind:?}: {report:?}");
        }
        ensure!(from.requests().is_empty(), "{kind:?}: {:?}", from.requests());
    }
    Ok(())
}
