//! How few requests a sync takes, as the registries themselves have written it down.

use anyhow::{Context as _, Result, ensure};
use imagemirror::copy::{CopyOptions, Referrers};
use testenv::{Client, Content, Env, Image, Registry};

use crate::cases::{self, access, sync_images};

const TAGS: usize = 12;
const PLATFORMS: [&str; 2] = ["linux/amd64", "linux/arm64"];

fn layer(name: &str) -> Content {
    Content::layer(name.repeat(100))
}

/// Two platforms, each with the layers that all tags share and one that is the tag's own.
fn image(tag: &str) -> Image {
    let layers = |platform: &str| {
        let own = layer(&format!("{tag} {platform}"));
        vec![layer("shared one"), layer("shared two"), own]
    };
    Image::of_layers(&PLATFORMS.map(|platform| (platform, layers(platform))))
}

/// What a registry has answered us about a repository.
#[derive(Debug, PartialEq, Eq)]
struct Answered {
    heads: usize,
    lists: usize,
    manifests: usize,
    blobs: usize,
    posts: usize,
    put_blobs: usize,
    put_manifests: usize,
    unauthorized: usize,
    others: usize,
}

const NOTHING: Answered = Answered {
    heads: 0,
    lists: 0,
    manifests: 0,
    blobs: 0,
    posts: 0,
    put_blobs: 0,
    put_manifests: 0,
    unauthorized: 0,
    others: 0,
};

fn answered(registry: &Registry, repository: &str) -> Result<Answered> {
    let mut found = NOTHING;
    for access in registry.access_log()? {
        let is_ours = access.user_agent.starts_with("imagemirror/");
        let Some(path) = access.path.strip_prefix(&format!("/v2/{repository}/")).filter(|_| is_ours) else { continue };
        let counter = match (access.status, access.method.as_str()) {
            (401, _) => &mut found.unauthorized,
            (_, "HEAD") if path.starts_with("manifests/") => &mut found.heads,
            (_, "GET") if path.starts_with("manifests/") => &mut found.manifests,
            (_, "GET") if path.starts_with("tags/list") => &mut found.lists,
            (_, "GET") if path.starts_with("blobs/sha256") => &mut found.blobs,
            (_, "POST") => &mut found.posts,
            (_, "PUT") if path.starts_with("manifests/") => &mut found.put_manifests,
            (_, "PUT") => &mut found.put_blobs,
            _ => &mut found.others,
        };
        *counter += 1;
    }
    Ok(found)
}

/// Syncs these references of one repository, with a client that knows nothing yet, and counts.
async fn counted(env: &Env, from: &str, to: &str, references: &[String]) -> Result<(Answered, Answered)> {
    counted_with(env, from, to, references, Referrers::None).await
}

async fn counted_with(
    env: &Env,
    from: &str,
    to: &str,
    references: &[String],
    referrers: Referrers,
) -> Result<(Answered, Answered)> {
    let (source, target) = (access(env, &env.source)?, access(env, &env.target)?);
    let before = (answered(&env.source, from)?, answered(&env.target, to)?);
    let image = |reference: &String| -> Result<_> {
        let mut image = cases::image(&source, from, to)?;
        match reference.parse() {
            Ok(digest) => image.source.digest = Some(digest),
            Err(_) => (image.source.tag, image.target_tag) = (Some(reference.parse()?), reference.parse()?),
        }
        Ok(image)
    };
    let images = references.iter().map(image).collect::<Result<Vec<_>>>()?;
    let options = CopyOptions { referrers, ..CopyOptions::default() };
    let report = sync_images(&cases::client(), vec![source], target, images, options).await?;
    ensure!(report.failed().next().is_none(), "{report:?}");
    let after = (answered(&env.source, from)?, answered(&env.target, to)?);
    Ok((less(&after.0, &before.0), less(&after.1, &before.1)))
}

/// From repository to repository of one registry, nothing of a large layer goes through us.
#[tokio::test]
async fn within_a_registry_layers_are_mounted() -> Result<()> {
    let env = cases::env();
    let (from, to) = (format!("{}/from", cases::prefix("mounted")), format!("{}/to", cases::prefix("mounted")));
    let image = Image::single(7, &[1 << 20, 2 << 20, 1000]);
    Client::new(env, &env.source)?.push(&from, "1", &image).await?;
    let (source, target) = (access(env, &env.source)?, access(env, &env.source)?);
    let mut wanted = cases::image(&source, &from, &to)?;
    (wanted.source.tag, wanted.target_tag) = (Some("1".parse()?), "1".parse()?);
    let options = CopyOptions { referrers: Referrers::None, ..CopyOptions::default() };
    let report = sync_images(&cases::client(), vec![source], target, vec![wanted], options).await?;
    ensure!(report.failed().next().is_none(), "{report:?}");
    let (read, written) = (answered(&env.source, &from)?, answered(&env.source, &to)?);
    // The small layer and the configuration are read and sent.
    ensure!(read.blobs == 2 && written.posts == 4 && written.put_blobs == 2, "{read:?}, {written:?}");
    ensure!(Client::new(env, &env.source)?.holds(&to, "1", &image).await?, "it is not the same");
    Ok(())
}

fn less(after: &Answered, before: &Answered) -> Answered {
    Answered {
        heads: after.heads - before.heads,
        lists: after.lists - before.lists,
        manifests: after.manifests - before.manifests,
        blobs: after.blobs - before.blobs,
        posts: after.posts - before.posts,
        put_blobs: after.put_blobs - before.put_blobs,
        put_manifests: after.put_manifests - before.put_manifests,
        unauthorized: after.unauthorized - before.unauthorized,
        others: after.others - before.others,
    }
}

#[tokio::test]
async fn the_registries_count_no_request_that_could_be_left_out() -> Result<()> {
    let env = cases::env();
    let (from, to) = (format!("{}/from", cases::prefix("economy")), format!("{}/to", cases::prefix("economy")));
    let tags: Vec<String> = (1..=TAGS).map(|n| n.to_string()).collect();
    let at_source = Client::new(env, &env.source)?;
    for tag in &tags {
        at_source.push(&from, tag, &image(tag)).await?;
    }
    let manifests = TAGS * (PLATFORMS.len() + 1);
    // Shared layers, a configuration for each platform and tag, a layer for each platform and tag.
    let blobs = 2 + TAGS * PLATFORMS.len() * 2;

    let (source, target) = counted(env, &from, &to, &tags).await?;
    ensure!(source == Answered { manifests, blobs, unauthorized: 1, ..NOTHING }, "fresh: {source:?}");
    let posts = Answered { posts: blobs, put_blobs: blobs, put_manifests: manifests, ..NOTHING };
    ensure!(target == Answered { heads: 1, lists: 1, unauthorized: 1, ..posts }, "fresh: {target:?}");

    let (source, target) = counted(env, &from, &to, &tags).await?;
    let heads = Answered { heads: TAGS, unauthorized: 1, ..NOTHING };
    ensure!(source == heads && target == heads, "nothing to do: {source:?}, {target:?}");

    // Where nothing can be attached to anything, looking for it is one list, and one question for the referrers API.
    let looks = Answered { lists: 1, others: 1, ..NOTHING };
    let (source, target) = counted_with(env, &from, &to, &tags, Referrers::All).await?;
    ensure!(source == Answered { heads: TAGS, unauthorized: 1, ..looks }, "nothing to do, nor attached: {source:?}");
    ensure!(target == heads, "nothing to do, nor attached: {target:?}");
    let (source, target) = counted_with(env, &from, &format!("{to}-attached"), &tags, Referrers::All).await?;
    ensure!(source == Answered { manifests, blobs, unauthorized: 1, ..looks }, "fresh, nothing attached: {source:?}");
    ensure!(target == Answered { heads: 1, lists: 1, unauthorized: 1, ..posts }, "fresh, nothing attached: {target:?}");

    // A tag of which the target has all but two layers and two configurations, in a process that knows nothing of it.
    at_source.push(&from, "next", &image("next")).await?;
    let (source, target) = counted(env, &from, &to, &["next".to_owned()]).await?;
    let manifests = PLATFORMS.len() + 1;
    ensure!(source == Answered { manifests, blobs: 4, unauthorized: 1, ..NOTHING }, "next tag: {source:?}");
    let posts = Answered { posts: 6, put_blobs: 4, put_manifests: manifests, ..NOTHING };
    ensure!(target == Answered { heads: 1, unauthorized: 1, ..posts }, "next tag: {target:?}");

    let pinned = image("1").digest().to_owned();
    let (source, target) = counted(env, &from, &to, &[pinned]).await.context("a pinned digest")?;
    ensure!(source == NOTHING, "pinned: {source:?}");
    ensure!(target == Answered { heads: 1, unauthorized: 1, ..NOTHING }, "pinned: {target:?}");
    Ok(())
}
