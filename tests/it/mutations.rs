//! Answers of the source that are not what they should be: flipped, cut, extended, swapped, with wrong headers, of the
//! wrong type, HTML, encoded. The tag at the target never changes, and the reason says integrity or refused.

use anyhow::{Context as _, Result, ensure};
use imagemirror::reason::Reason;
use testenv::{
    Env,
    images::{Content, Image},
    proxy::{Action, Matcher, Proxy},
};

use crate::cases::{copy, side_by_side};

const HTML: &str = "<!DOCTYPE html><title>Sign in to the network</title>";

/// What is done to the answer with this content, and which reasons are right for it.
fn mutations(content: &Content, other: &Content, is_manifest: bool) -> Vec<(String, Action, &'static [Reason])> {
    const WRONG: &[Reason] = &[Reason::IntegrityError];
    const WRONG_OR_REFUSED: &[Reason] = &[Reason::IntegrityError, Reason::ManifestRefused];
    let len = content.bytes.len();
    let typed = |body: Vec<u8>| Action::respond(200).header("Content-Type", &content.media_type).body(body);
    let mut found = Vec::new();
    for at in (0..10).map(|tenth| len * tenth / 10).chain([len - 2, len - 1]) {
        found.push((format!("flip at {at}"), Action::FlipByte { at: at as u64 }, WRONG_OR_REFUSED));
    }
    for cut in [1, len / 2, len - 1] {
        found.push((format!("cut to {cut}"), typed(content.bytes[..cut].to_vec()), WRONG_OR_REFUSED));
    }
    for more in [&b"\n"[..], b"}", &[0; 1000]] {
        found.push((format!("{} bytes more", more.len()), typed([&content.bytes, more].concat()), WRONG_OR_REFUSED));
    }
    found.push(("swapped".into(), typed(other.bytes.to_vec()), WRONG_OR_REFUSED));
    found.push(("nothing".into(), typed(Vec::new()), WRONG_OR_REFUSED));
    let html = Action::respond(200).header("Content-Type", "text/html").body(HTML);
    found.push(("a page".into(), html, WRONG_OR_REFUSED));
    if is_manifest {
        let kind = "application/vnd.docker.distribution.manifest.v2+json";
        found.push(("another type".into(), Action::set_header("Content-Type", kind), &[Reason::ManifestRefused]));
        found.push((
            "a type for people".into(),
            Action::set_header("Content-Type", "text/html"),
            &[Reason::ManifestRefused],
        ));
    } else {
        found.push(("encoded".into(), Action::set_header("Content-Encoding", "gzip"), WRONG));
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_not_what_it_should_be_never_moves_the_tag() -> Result<()> {
    let env = crate::cases::env();
    let prefix = crate::cases::prefix("mutations");
    let repository = format!("{prefix}/agent");
    let (old, new) =
        (Image::single(211, &[10]), Image::multi_arch(212, &[1_100_000, 3_000], &["linux/amd64", "linux/arm64"]));
    testenv::Client::new(env, &env.source)?.push(&repository, "1", &new).await?;

    let mut cases = Vec::new();
    let manifests = new.manifests.iter().chain([&new.root]).map(|content| (content, true));
    for (content, is_manifest) in manifests.chain(new.blobs.iter().map(|content| (content, false))) {
        let other = if is_manifest { &old.root } else { &old.blobs[0] };
        for (what, action, reasons) in mutations(content, other, is_manifest) {
            // The root is asked for by its tag where nothing is at the target, and by its digest where something is.
            if content.digest == new.root.digest && matches!(action, Action::FlipByte { .. } | Action::SetHeader { .. })
            {
                let what = format!("{what} of the tag");
                cases.push((cases.len(), what, "1".to_owned(), action.clone(), reasons));
            }
            let what = format!("{what} of {} {}", content.media_type, content.digest);
            cases.push((cases.len(), what, content.digest.clone(), action, reasons));
        }
    }
    ensure!(cases.len() >= 200, "only {} cases", cases.len());
    let cases = cases.into_iter().map(|(number, what, reference, action, reasons)| {
        let to = format!("{prefix}/case-{number}");
        (what, one_mutation(env, &repository, to, &old, reference, action, reasons))
    });
    side_by_side(cases).await
}

async fn one_mutation(
    env: &Env,
    repository: &str,
    to: String,
    old: &Image,
    reference: String,
    action: Action,
    reasons: &[Reason],
) -> Result<()> {
    let at_target = testenv::Client::new(env, &env.target)?;
    let expected = (reference != "1").then(|| old.digest());
    if expected.is_some() {
        at_target.push(&to, "1", old).await?;
    }
    let source = Proxy::to(env, &env.source).start().await?;
    let target = Proxy::to(env, &env.target).start().await?;
    source.rule(Matcher::new().method("GET").repository(repository).reference(&reference), action);
    let report = copy(env, source.registry(), target.registry(), repository, &to).await?;
    let tag = at_target.digest_of(&to, "1").await?;
    ensure!(tag.as_deref() == expected, "the tag is {tag:?}");
    ensure!(target.violations().is_empty(), "{:?}", target.violations());
    let (_, failure) = report.failed().next().context("it was taken for good")?;
    ensure!(reasons.contains(&failure.reason), "{}: {}", failure.reason, failure.message);
    Ok(())
}
