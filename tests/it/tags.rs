//! What it costs to find that a tag is there, where many are wanted, and where a digest is pinned.

use anyhow::{Context as _, Result, ensure};
use imagemirror::{copy::Referrers, plan::Action};
use testenv::{
    Env, Image, Proxy,
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
