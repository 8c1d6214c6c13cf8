//! Some platforms of an image: what is listed at the target, what comes along, and what it costs to find that nothing
//! has changed.

use anyhow::{Context as _, Result, ensure};
use imagemirror::{plan::Action, reason::Reason};
use serde_json::{Value, json};
use testenv::{
    Content, Env, Image, Proxy,
    artifacts::fallback_tag,
    registry::Kind::{Distribution, Olareg},
};

use crate::direct::{Direct, Directory, HOST, client_of, prefix, server};

const PLATFORMS: [&str; 4] = ["linux/amd64", "linux/arm64", "linux/arm/v6", "linux/arm/v7"];

/// The index with those of its entries alone, written as the test's images are, and with what they name.
fn subset(image: &Image, kept: &[usize]) -> Image {
    let root: Value = serde_json::from_slice(&image.root.bytes).unwrap_or_default();
    let entries: Vec<Value> = kept.iter().map(|entry| root["manifests"][entry].clone()).collect();
    let mut subset = image.clone().with_fields(&json!({ "manifests": entries }));
    subset.manifests = kept.iter().map(|entry| image.manifests[*entry].clone()).collect();
    let text: String =
        subset.manifests.iter().map(|manifest| String::from_utf8_lossy(&manifest.bytes).into_owned()).collect();
    subset.blobs.retain(|blob| text.contains(&blob.digest));
    subset
}

#[tokio::test]
async fn the_platforms_that_are_kept_are_listed_as_they_were_and_the_rest_is_not_there() -> Result<()> {
    let env = Env::get();
    let prefix = prefix("platforms");
    let image = Image::multi_arch(200, &[300], &PLATFORMS).with_attestations(201);
    let docker = Image::docker(202, &[300], &PLATFORMS);
    let client = client_of(&env.open)?;
    client.push(&format!("{prefix}/oci"), "1", &image).await?;
    client.push(&format!("{prefix}/docker"), "1", &docker).await?;
    let mut failures = Vec::new();
    for (number, (name, platforms, kept)) in [
        ("oci", &["linux/amd64"][..], &[0, 4][..]),
        ("oci", &["linux/amd64", "linux/arm64"], &[0, 1, 4, 5]),
        // In the order of the source, whatever the order of the wish.
        ("oci", &["linux/arm64", "linux/amd64"], &[0, 1, 4, 5]),
        ("oci", &["linux/arm64/v8"], &[1, 5]),
        ("oci", &["linux/arm/v7"], &[3, 7]),
        ("oci", &["linux/arm"], &[2, 3, 6, 7]),
        ("oci", &["linux/amd64", "windows/amd64"], &[0, 4]),
        ("oci", &PLATFORMS, &[0, 1, 2, 3, 4, 5, 6, 7]),
        ("docker", &["linux/arm/v6"], &[2]),
        ("docker", &PLATFORMS, &[0, 1, 2, 3]),
    ]
    .into_iter()
    .enumerate()
    {
        let source = if name == "oci" { &image } else { &docker };
        let expected = subset(source, kept);
        let (from, to) = (format!("{prefix}/{name}:1"), format!("{prefix}/to-{number}"));
        let case = async {
            let report = Direct::of(&from, &format!("{to}:1")).platforms(platforms).done(&env.open, &env.open).await?;
            let json = serde_json::to_value(&report)?;
            let told = &json["images"][0];
            ensure!(told["digest"] == expected.digest() && told["sourceDigest"] == source.digest(), "{told}");
            ensure!(client.holds(&to, "1", &expected).await?, "it is not what was expected");
            for manifest in source.manifests.iter().filter(|manifest| !expected.manifests.contains(manifest)) {
                ensure!(client.digest_of(&to, &manifest.digest).await?.is_none(), "{} is there", manifest.digest);
            }
            let is_whole = kept.len() == source.manifests.len();
            ensure!((told["digest"] == told["sourceDigest"]) == is_whole);
            Ok(())
        };
        if let Err(error) = case.await.with_context(|| format!("{platforms:?} of {name}")) {
            failures.push(format!("{error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[tokio::test]
async fn the_text_of_what_is_kept_stays() -> Result<()> {
    let env = Env::get();
    let prefix = prefix("platforms-text");
    let image = Image::multi_arch(210, &[300], &PLATFORMS).with_fields(&json!({ "x-unknown": [1, 2] })).spaced();
    let client = client_of(&env.open)?;
    client.push(&prefix, "1", &image).await?;
    let mut digests = Vec::new();
    for to in ["first", "second"] {
        let copy = Direct::of(&format!("{prefix}:1"), &format!("{prefix}/{to}:1")).platforms(&["linux/arm/v7"]);
        copy.done(&env.open, &env.open).await?;
        let root = client.manifest(&format!("{prefix}/{to}"), "1").await?.context("no tag")?;
        let (text, before) =
            (String::from_utf8_lossy(&root.bytes), String::from_utf8_lossy(&image.root.bytes).into_owned());
        let open = text.find("\"manifests\":[").context("no manifests")? + "\"manifests\":[".len();
        let close = text.rfind("}]").context("no end of the manifests")? + 1;
        let entry = &text[open..close];
        ensure!(entry.contains('\n') && before.contains(entry), "{entry}");
        ensure!(before.matches("x-unknown").count() == text.matches("x-unknown").count());
        digests.push(root.digest);
    }
    ensure!(digests[0] == digests[1], "{digests:?}");
    Ok(())
}

#[tokio::test]
async fn nested_indexes_are_taken_apart_too() -> Result<()> {
    let env = Env::get();
    let prefix = prefix("platforms-nested");
    let inner = Image::multi_arch(220, &[300], &["linux/amd64", "linux/arm64"]);
    let other = Image::multi_arch(221, &[300], &["linux/s390x"]);
    let image = Image::index_of(&[(&inner, json!({ "annotations": { "k": "v" } })), (&other, json!({}))]);
    let kept = subset(&inner, &[1]);
    let expected = Image::index_of(&[(&kept, json!({ "annotations": { "k": "v" } }))]);
    let client = client_of(&env.open)?;
    client.push(&prefix, "1", &image).await?;
    let copy = Direct::of(&format!("{prefix}:1"), &format!("{prefix}/to:1")).platforms(&["linux/arm64"]);
    let report = copy.done(&env.open, &env.open).await?;
    ensure!(client.holds(&format!("{prefix}/to"), "1", &expected).await?);
    let again = copy.after(&report).done(&env.open, &env.open).await?;
    ensure!(again.images[0].action == Some(Action::Unchanged) && again.totals.blobs_copied == 0, "{again:?}");

    // The same by way of a directory.
    let directory = Directory::new()?;
    let copy = Direct::of(&format!("{prefix}:1"), "unused:1").platforms(&["linux/arm64"]).called(HOST);
    copy.done(&env.open, &directory.layout()?).await?;
    ensure!(directory.holds(&format!("{HOST}/{prefix}:1"), &expected)?);
    Ok(())
}

#[tokio::test]
async fn an_image_for_none_of_the_platforms_is_refused_and_one_without_any_is_kept() -> Result<()> {
    let env = Env::get();
    let prefix = prefix("platforms-none");
    let client = client_of(&env.open)?;
    let single = Image::single(230, &[300]);
    let chart = Image::artifact(231, "application/vnd.cncf.helm.config.v1+json");
    for (number, (image, platforms, is_kept)) in [
        (Image::multi_arch(232, &[300], &PLATFORMS), &["windows/amd64"][..], false),
        (Image::multi_arch(232, &[300], &PLATFORMS), &["linux/arm/v5"], false),
        (Image::index_of(&[]), &["linux/amd64"], false),
        (single.clone(), &["linux/arm64"], false),
        (single.clone(), &["linux/arm64", "linux/amd64"], true),
        (single, &["linux/amd64/v1"], true),
        (chart, &["linux/amd64"], true),
    ]
    .into_iter()
    .enumerate()
    {
        let from = format!("{prefix}/{number}");
        client.push(&from, "1", &image).await?;
        let to = format!("{from}/to");
        let copy = Direct::of(&format!("{from}:1"), &format!("{to}:1")).platforms(platforms);
        if is_kept {
            copy.done(&env.open, &env.open).await?;
            ensure!(client.holds(&to, "1", &image).await?, "{platforms:?}");
            continue;
        }
        let (reason, message) = copy.fails(&env.open, &env.open).await?;
        ensure!(reason == Reason::PlatformMissing && message.contains(platforms[0]), "{reason}: {message}");
        ensure!(message.contains("spec.images[].platforms"), "{message}");
        ensure!(client.digest_of(&to, "1").await?.is_none(), "{number} was written");
    }
    Ok(())
}

#[tokio::test]
async fn that_nothing_has_changed_is_known_from_the_last_time_or_from_the_sources_index_alone() -> Result<()> {
    let env = Env::get();
    let prefix = prefix("platforms-noop");
    let image = Image::multi_arch(240, &[300], &PLATFORMS);
    let client = client_of(&env.open)?;
    client.push(&prefix, "1", &image).await?;
    let server = server(Distribution).await?;
    let source = Proxy::to(env, &env.open).start().await?;
    let target = Proxy::to(env, server.registry()).start().await?;
    let copy = || Direct::of(&format!("{prefix}:1"), "to:1").platforms(&["linux/amd64"]).without_a_look();
    let report = copy().done(source.registry(), target.registry()).await?;
    let methods = |proxy: &Proxy| {
        let of = |request: &testenv::proxy::Exchange| format!("{} {:?}", request.key.method, request.key.route);
        proxy.requests().iter().map(of).collect::<Vec<_>>()
    };
    source.forget();
    target.forget();
    let again = copy().done(source.registry(), target.registry()).await?;
    ensure!(again.images[0].action == Some(Action::Unchanged), "{again:?}");
    ensure!(again.images[0].digest == report.images[0].digest);
    ensure!(methods(&source) == ["HEAD Manifest", "GET Manifest"], "{:?}", methods(&source));
    ensure!(methods(&target) == ["HEAD Manifest"], "{:?}", methods(&target));

    source.forget();
    target.forget();
    let again = copy().after(&report).done(source.registry(), target.registry()).await?;
    ensure!(again.images[0].action == Some(Action::Unchanged), "{again:?}");
    ensure!(methods(&source) == ["HEAD Manifest"] && methods(&target) == ["HEAD Manifest"]);

    // Another platform of the source has changed: what is kept is as it was.
    let mut changed = image.clone();
    let news = Image::multi_arch(241, &[300], &PLATFORMS);
    let entry = |image: &Image, number: usize| {
        let root: Value = serde_json::from_slice(&image.root.bytes).unwrap_or_default();
        root["manifests"][number].clone()
    };
    changed.manifests.extend(news.manifests.clone());
    changed.blobs.extend(news.blobs.clone());
    let changed = changed.with_fields(&json!({ "manifests": [entry(&image, 0), entry(&news, 1)] }));
    client.push(&prefix, "1", &changed).await?;
    let again = copy().after(&report).done(source.registry(), target.registry()).await?;
    ensure!(again.images[0].action == Some(Action::Unchanged), "{again:?}");
    ensure!(again.images[0].source_digest.as_ref().is_some_and(|digest| digest.to_string() == changed.digest()));
    Ok(())
}

#[tokio::test]
async fn what_is_attached_to_kept_manifests_comes_along() -> Result<()> {
    for kind in [Olareg, Distribution] {
        let (source, target) = (server(kind).await?, server(Olareg).await?);
        let image = Image::multi_arch(250, &[300], &["linux/amd64", "linux/arm64"]);
        let client = client_of(source.registry())?;
        client.push("a", "1", &image).await?;
        let subjects: [&Content; 3] = [&image.manifests[0], &image.manifests[1], &image.root];
        let referrers = [0, 1, 2].map(|number| Image::referrer(subjects[number], 251 + number as u64, "application/x"));
        for (subject, referrer) in subjects.iter().zip(&referrers) {
            client.push("a", referrer.digest(), referrer).await?;
            if kind == Distribution {
                client.push("a", &fallback_tag(subject), &Image::fallback_index(&[referrer])).await?;
            }
        }
        Direct::of("a:1", "a:1").platforms(&["linux/arm64"]).done(source.registry(), target.registry()).await?;
        let target_client = client_of(target.registry())?;
        for (subject, referrer, is_kept) in [(0, 0, false), (1, 1, true), (2, 2, false)] {
            let listed = target_client.referrers("a", &subjects[subject].digest).await?.context("no API")?;
            let is_listed = listed.iter().any(|entry| entry["digest"] == referrers[referrer].digest());
            ensure!(is_listed == is_kept, "{kind:?}, {subject}: {listed:?}");
        }
        ensure!(target_client.holds("a", referrers[1].digest(), &referrers[1]).await?);
    }
    Ok(())
}
