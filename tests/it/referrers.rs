//! What is attached to an image goes with it and is found at the target: by the referrers API or by tags, whichever the
//! two registries have.

use anyhow::{Context as _, Result, ensure};
use imagemirror::{copy::Referrers, plan::Action, reason::Reason};
use serde_json::{Value, json};
use testenv::{
    Content, Env, Image, Proxy, Registry, RegistryServer,
    artifacts::{cosign_tag, fallback_tag},
    images::OCI_INDEX,
    proxy::{Action as Do, Gate, Matcher, Route},
    registry::Kind::{self, Distribution, Olareg},
};

use crate::direct::{Direct, client_of, prefix, server};

const SBOM: &str = "application/spdx+json";
const SIGNATURE: &str = "application/vnd.example.signature";

/// Pushes referrers of `subject` and, where the registry does not do that itself, lists them under the fallback tag.
async fn attach(
    registry: &Registry,
    has_api: bool,
    repository: &str,
    subject: &Content,
    referrers: &[&Image],
) -> Result<()> {
    let client = client_of(registry)?;
    for referrer in referrers {
        client.push(repository, referrer.digest(), referrer).await?;
    }
    if !has_api {
        client.push(repository, &fallback_tag(subject), &Image::fallback_index(referrers)).await?;
    }
    Ok(())
}

/// What a registry says is attached, by its API or under the fallback tag.
async fn listed(registry: &Registry, has_api: bool, repository: &str, subject: &Content) -> Result<Vec<Value>> {
    let client = client_of(registry)?;
    if has_api {
        return client.referrers(repository, &subject.digest).await?.context("it has no API");
    }
    let Some(index) = client.manifest(repository, &fallback_tag(subject)).await? else { return Ok(Vec::new()) };
    ensure!(index.media_type == OCI_INDEX, "{}", index.media_type);
    let index: Value = serde_json::from_slice(&index.bytes)?;
    Ok(index["manifests"].as_array().context("it lists nothing")?.clone())
}

fn digests(entries: &[Value]) -> Vec<&str> {
    let mut digests: Vec<&str> = entries.iter().filter_map(|entry| entry["digest"].as_str()).collect();
    digests.sort_unstable();
    digests
}

fn is_listed(entries: &[Value], referrer: &Image) -> bool {
    let entry = entries.iter().find(|entry| entry["digest"] == referrer.digest());
    let root: Value = serde_json::from_slice(&referrer.root.bytes).unwrap_or_default();
    entry.is_some_and(|entry| {
        entry["artifactType"] == root["artifactType"] && entry["annotations"] == root["annotations"]
    })
}

/// An image of two platforms with an SBOM, a signature of the SBOM, and a signature of its second manifest.
struct Attached {
    image: Image,
    sbom: Image,
    of_sbom: Image,
    of_child: Image,
}

impl Attached {
    fn new(seed: u64) -> Self {
        let image = Image::multi_arch(seed, &[300], &["linux/amd64", "linux/arm64"]);
        let sbom = Image::referrer(&image.root, seed + 1, SBOM);
        let of_sbom = Image::referrer(&sbom.root, seed + 2, SIGNATURE);
        let of_child = Image::referrer(&image.manifests[1], seed + 3, SIGNATURE);
        Self { image, sbom, of_sbom, of_child }
    }

    fn each(&self) -> [(&Content, &Image); 3] {
        let child = &self.image.manifests[1];
        [(&self.image.root, &self.sbom), (&self.sbom.root, &self.of_sbom), (child, &self.of_child)]
    }

    async fn push(&self, registry: &Registry, has_api: bool, repository: &str) -> Result<()> {
        client_of(registry)?.push(repository, "1", &self.image).await?;
        for (subject, referrer) in self.each() {
            attach(registry, has_api, repository, subject, &[referrer]).await?;
        }
        Ok(())
    }

    async fn check(&self, registry: &Registry, has_api: bool, repository: &str) -> Result<()> {
        let client = client_of(registry)?;
        ensure!(client.holds(repository, "1", &self.image).await?, "the image is not the same");
        for (subject, referrer) in self.each() {
            let digest = referrer.digest();
            ensure!(client.holds(repository, digest, referrer).await?, "{digest} is not there");
            let entries = listed(registry, has_api, repository, subject).await?;
            ensure!(is_listed(&entries, referrer) && entries.len() == 1, "{digest} is not in {entries:?}");
        }
        Ok(())
    }
}

async fn pair(source: Kind, target: Kind) -> Result<(RegistryServer, RegistryServer)> {
    Ok((server(source).await?, server(target).await?))
}

#[tokio::test]
async fn all_that_is_attached_goes_with_the_image_from_and_to_registries_with_and_without_the_api() -> Result<()> {
    let attached = Attached::new(100);
    let (old, new) = pair(Distribution, Olareg).await?;
    let registries = [(old.registry(), false), (new.registry(), true)];
    for (registry, has_api) in registries {
        attached.push(registry, has_api, "source").await?;
    }
    for (source, source_has_api) in registries {
        for (target, target_has_api) in registries {
            let to = format!("from-{source_has_api}-to-{target_has_api}");
            let copied = Direct::of("source:1", &format!("{to}:1")).done(source, target).await;
            copied.context(to.clone())?;
            attached.check(target, target_has_api, &to).await.context(to)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn pages_of_referrers_are_read_to_the_last() -> Result<()> {
    let (source, target) = pair(Olareg, Distribution).await?;
    let image = Image::single(110, &[300]);
    let referrers = [1, 2, 3].map(|number| Image::referrer(&image.root, 110 + number, SBOM));
    client_of(source.registry())?.push("a", "1", &image).await?;
    for referrer in &referrers {
        attach(source.registry(), true, "a", &image.root, &[referrer]).await?;
    }
    let proxy = Proxy::to(Env::get(), source.registry()).start().await?;
    let path = format!("/v2/a/referrers/{}", image.digest());
    for (number, referrer) in referrers.iter().enumerate() {
        let this = if number == 0 { path.clone() } else { format!("{path}?page={number}") };
        let mut actions = vec![Do::replace_body(Image::fallback_index(&[referrer]).root.bytes)];
        if number < 2 {
            actions.push(Do::set_header("Link", &format!("<{path}?page={}>; rel=\"next\"", number + 1)));
        }
        // The path without a query is a part of the others, so that it must not match a second time.
        let matcher = Matcher::new().route(Route::Referrers).path_contains(&this);
        proxy.rule(if number == 0 { matcher.times(1) } else { matcher }, actions);
    }
    Direct::of("a:1", "a:1").done(proxy.registry(), target.registry()).await?;
    let entries = listed(target.registry(), false, "a", &image.root).await?;
    ensure!(referrers.iter().all(|referrer| is_listed(&entries, referrer)) && entries.len() == 3, "{entries:?}");
    Ok(())
}

#[tokio::test]
async fn what_others_listed_under_the_fallback_tag_stays_and_nothing_is_written_when_nothing_is_new() -> Result<()> {
    let (source, target) = pair(Olareg, Distribution).await?;
    let image = Image::single(120, &[300]);
    let (ours, theirs) = (Image::referrer(&image.root, 121, SBOM), Image::referrer(&image.root, 122, SIGNATURE));
    client_of(source.registry())?.push("a", "1", &image).await?;
    attach(source.registry(), true, "a", &image.root, &[&ours]).await?;
    client_of(target.registry())?.push("a", "1", &image).await?;
    attach(target.registry(), false, "a", &image.root, &[&theirs]).await?;

    let proxy = Proxy::to(Env::get(), target.registry()).start().await?;
    let sync = Direct::of("a:1", "a:1");
    let report = sync.done(source.registry(), proxy.registry()).await?;
    ensure!(report.images[0].action == Some(Action::Unchanged), "{report:?}");
    let entries = listed(target.registry(), false, "a", &image.root).await?;
    ensure!(is_listed(&entries, &ours) && is_listed(&entries, &theirs) && entries.len() == 2, "{entries:?}");
    ensure!(entries[0]["digest"] == theirs.digest(), "the order changed");
    ensure!(proxy.violations().is_empty(), "{:?}", proxy.violations());

    proxy.forget();
    sync.after(&report).done(source.registry(), proxy.registry()).await?;
    let writes: Vec<_> = proxy
        .requests()
        .into_iter()
        .filter(|request| !["GET", "HEAD"].contains(&request.key.method.as_str()))
        .collect();
    ensure!(writes.is_empty(), "{writes:#?}");
    Ok(())
}

#[tokio::test]
async fn an_entry_that_another_client_overwrites_is_written_again() -> Result<()> {
    let (source, target) = pair(Olareg, Distribution).await?;
    let image = Image::single(130, &[300]);
    let (ours, theirs) = (Image::referrer(&image.root, 131, SBOM), Image::referrer(&image.root, 132, SIGNATURE));
    client_of(source.registry())?.push("a", "1", &image).await?;
    attach(source.registry(), true, "a", &image.root, &[&ours]).await?;
    let proxy = Proxy::to(Env::get(), target.registry()).start().await?;
    let (tag, gate) = (fallback_tag(&image.root), Gate::new());
    let write = Matcher::new().method("PUT").route(Route::Manifest).reference(&tag);
    proxy.rule(write.clone().times(1), Do::GateAnswer(gate.clone()));
    let sync = Direct::of("a:1", "a:1");
    let others = async {
        gate.arrived(1).await?;
        attach(target.registry(), false, "a", &image.root, &[&theirs]).await?;
        gate.open();
        Ok::<_, anyhow::Error>(())
    };
    let (report, others) = tokio::join!(sync.done(source.registry(), proxy.registry()), others);
    others?;
    report?;
    let entries = listed(target.registry(), false, "a", &image.root).await?;
    ensure!(is_listed(&entries, &ours) && is_listed(&entries, &theirs) && entries.len() == 2, "{entries:?}");
    ensure!(proxy.count(&write) == 2);
    Ok(())
}

#[tokio::test]
async fn an_entry_that_another_client_writes_after_we_have_read_is_not_overwritten() -> Result<()> {
    let (source, target) = pair(Olareg, Distribution).await?;
    let image = Image::single(135, &[300]);
    let [ours, first, second] = [136, 137, 138].map(|number| Image::referrer(&image.root, number, SBOM));
    client_of(source.registry())?.push("a", "1", &image).await?;
    attach(source.registry(), true, "a", &image.root, &[&ours]).await?;
    let proxy = Proxy::to(Env::get(), target.registry()).start().await?;
    let tag = fallback_tag(&image.root);
    let (read, gates) =
        (Matcher::new().method("GET").route(Route::Manifest).reference(&tag), [Gate::new(), Gate::new()]);
    for gate in &gates {
        proxy.rule(read.clone().times(1), Do::GateAnswer(gate.clone()));
    }
    let sync = Direct::of("a:1", "a:1");
    let others = async {
        // The second has read what the first wrote.
        for (gate, theirs) in gates.iter().zip([&[&first][..], &[&first, &second]]) {
            gate.arrived(1).await?;
            attach(target.registry(), false, "a", &image.root, theirs).await?;
            gate.open();
        }
        Ok::<_, anyhow::Error>(())
    };
    let (report, others) = tokio::join!(sync.done(source.registry(), proxy.registry()), others);
    others?;
    report?;
    let entries = listed(target.registry(), false, "a", &image.root).await?;
    let are_listed = [&ours, &first, &second].iter().all(|referrer| is_listed(&entries, referrer));
    ensure!(are_listed && entries.len() == 3, "{entries:?}");
    ensure!(proxy.count(&Matcher::new().method("PUT").route(Route::Manifest).reference(&tag)) == 1);
    Ok(())
}

#[tokio::test]
async fn an_entry_that_never_stays_is_given_up() -> Result<()> {
    let (source, target) = pair(Olareg, Distribution).await?;
    let image = Image::single(185, &[300]);
    client_of(source.registry())?.push("a", "1", &image).await?;
    attach(source.registry(), true, "a", &image.root, &[&Image::referrer(&image.root, 186, SBOM)]).await?;
    let proxy = Proxy::to(Env::get(), target.registry()).start().await?;
    let tag = fallback_tag(&image.root);
    // As if another client took it out each time.
    for method in ["GET", "HEAD"] {
        proxy.rule(Matcher::new().method(method).route(Route::Manifest).reference(&tag), Do::respond(404));
    }
    let (reason, message) = Direct::of("a:1", "a:1").fails(source.registry(), proxy.registry()).await?;
    let writes = Matcher::new().method("PUT").route(Route::Manifest).reference(&tag);
    // What was never there is no matter of another client: GitLab's takes it, and has it nowhere.
    ensure!(reason == Reason::ManifestRefused && message.contains("cannot be found there"), "{reason}: {message}");
    ensure!(proxy.count(&writes) == 5);
    proxy.clear();
    proxy.forget();
    let empty = Image::index_of(&[]).root;
    for method in ["GET", "HEAD"] {
        let answer = Do::respond(200).header("Content-Type", OCI_INDEX).header("Docker-Content-Digest", &empty.digest);
        let answer = if method == "GET" { answer.body(empty.bytes.clone()) } else { answer };
        proxy.rule(Matcher::new().method(method).route(Route::Manifest).reference(&tag), answer);
    }
    let (reason, message) = Direct::of("a:1", "b:1").fails(source.registry(), proxy.registry()).await?;
    ensure!(reason == Reason::Conflict && message.contains(&tag), "{reason}: {message}");
    ensure!(proxy.count(&writes) == 5);
    Ok(())
}

/// As GitLab's does.
#[tokio::test]
async fn a_registry_that_reads_the_fallback_tag_as_the_digest_has_no_list_there() -> Result<()> {
    let (source, target) = pair(Distribution, Distribution).await?;
    let image = Image::multi_arch(192, &[300], &["linux/amd64", "linux/arm64"]);
    let reads_it_so = |proxy: &Proxy| {
        let whole = Do::respond(200)
            .header("Content-Type", &image.root.media_type)
            .header("Docker-Content-Digest", &image.root.digest)
            .body(image.root.bytes.clone());
        proxy.rule(Matcher::new().method("GET").route(Route::Manifest).reference(&fallback_tag(&image.root)), whole);
    };
    client_of(source.registry())?.push("a", "1", &image).await?;
    let proxy = Proxy::to(Env::get(), source.registry()).start().await?;
    reads_it_so(&proxy);
    proxy.rule(Matcher::new().route(Route::Tags), Do::respond(403));
    Direct::of("a:1", "a:1").done(proxy.registry(), target.registry()).await?;
    let found = client_of(target.registry())?.tags("a").await?;
    ensure!(found == ["1"], "the platforms are taken for what is attached: {found:?}");
    let source = server(Olareg).await?;
    client_of(source.registry())?.push("b", "1", &image).await?;
    attach(source.registry(), true, "b", &image.root, &[&Image::referrer(&image.root, 193, SBOM)]).await?;
    let proxy = Proxy::to(Env::get(), target.registry()).start().await?;
    reads_it_so(&proxy);
    let (reason, message) = Direct::of("b:1", "b:1").fails(source.registry(), proxy.registry()).await?;
    ensure!(
        reason == Reason::ManifestRefused && message.contains("spec.referrers.policy: None"),
        "{reason}: {message}"
    );
    ensure!(proxy.count(&Matcher::new().method("PUT").reference(&fallback_tag(&image.root))) == 0);
    Ok(())
}

#[tokio::test]
async fn what_a_registry_does_not_say_that_it_lists_is_listed_under_a_tag() -> Result<()> {
    let (source, target) = pair(Olareg, Distribution).await?;
    let attached = Attached::new(187);
    attached.push(source.registry(), true, "a").await?;
    // It answers as if it had the API, and of what it takes it does not say that it lists it.
    let proxy = Proxy::to(Env::get(), target.registry()).start().await?;
    let nothing = Do::respond(200).header("Content-Type", OCI_INDEX).body(Image::index_of(&[]).root.bytes);
    proxy.rule(Matcher::new().route(Route::Referrers), nothing);
    let client = crate::cases::client();
    let known = Image::single(191, &[300]);
    client_of(target.registry())?.push("known", "1", &known).await?;
    Direct::of("known:1", "known:1").with(&client).done(proxy.registry(), source.registry()).await?;
    Direct::of("a:1", "a:1").with(&client).done(source.registry(), proxy.registry()).await?;
    attached.check(target.registry(), false, "a").await
}

#[tokio::test]
async fn two_images_of_one_digest_at_once_lose_nothing_that_is_attached() -> Result<()> {
    let (source, target) = pair(Olareg, Distribution).await?;
    let image = Image::single(140, &[300]);
    let mut sync: Option<Direct> = None;
    let mut all = Vec::new();
    for number in 0..6_u32 {
        let repository = format!("source-{number}");
        let referrer = Image::referrer(&image.root, 141 + u64::from(number), SBOM);
        client_of(source.registry())?.push(&repository, "1", &image).await?;
        attach(source.registry(), true, &repository, &image.root, &[&referrer]).await?;
        all.push(referrer);
        let (from, to) = (format!("{repository}:1"), format!("a:{number}"));
        sync = Some(match sync {
            None => Direct::of(&from, &to),
            Some(sync) => sync.and(&from, &to),
        });
    }
    sync.context("no images")?.done(source.registry(), target.registry()).await?;
    let entries = listed(target.registry(), false, "a", &image.root).await?;
    ensure!(all.iter().all(|referrer| is_listed(&entries, referrer)) && entries.len() == 6, "{entries:?}");
    Ok(())
}

#[tokio::test]
async fn signatures_under_cosigns_tags_go_with_what_they_sign() -> Result<()> {
    let (source, target) = pair(Distribution, Distribution).await?;
    let image = Image::multi_arch(150, &[300], &["linux/amd64", "linux/arm64"]);
    let child = &image.manifests[0];
    let client = client_of(source.registry())?;
    client.push("a", "1", &image).await?;
    let mut signatures = Vec::new();
    for (number, (subject, suffix)) in
        [(&image.root, "sig"), (&image.root, "att"), (&image.root, "sbom"), (child, "sig")].into_iter().enumerate()
    {
        let signature = Image::cosign_signature(subject, 151 + number as u64);
        let tag = cosign_tag(subject, suffix);
        client.push("a", &tag, &signature).await?;
        signatures.push((tag, signature));
    }
    Direct::of("a:1", "all:1").done(source.registry(), target.registry()).await?;
    let at_target = client_of(target.registry())?;
    for (tag, signature) in &signatures {
        ensure!(at_target.holds("all", tag, signature).await?, "{tag}");
    }
    let selected = Referrers::Selected(vec!["application/vnd.dev.cosign.artifact.sig.v1+json".into()]);
    Direct::of("a:1", "some:1").referrers(selected).done(source.registry(), target.registry()).await?;
    let mut tags = at_target.tags("some").await?;
    tags.sort();
    let mut expected = vec!["1".to_owned(), signatures[0].0.clone(), signatures[3].0.clone()];
    expected.sort();
    ensure!(tags == expected, "{tags:?}");

    // A signature that was made anew moves its tag.
    let anew = Image::cosign_signature(&image.root, 159);
    client.push("a", &signatures[0].0, &anew).await?;
    let report = Direct::of("a:1", "all:1").done(source.registry(), target.registry()).await?;
    ensure!(report.images[0].action == Some(Action::Unchanged), "{report:?}");
    ensure!(at_target.holds("all", &signatures[0].0, &anew).await?);
    Ok(())
}

#[tokio::test]
async fn policies_say_what_is_asked_for_and_what_is_copied() -> Result<()> {
    let (source, target) = pair(Olareg, Olareg).await?;
    let attached = Attached::new(160);
    let signature = Image::referrer(&attached.image.root, 165, SIGNATURE);
    attached.push(source.registry(), true, "a").await?;
    attach(source.registry(), true, "a", &attached.image.root, &[&signature]).await?;
    let from = Proxy::to(Env::get(), source.registry()).start().await?;
    let to = Proxy::to(Env::get(), target.registry()).start().await?;
    let none = Direct::of("a:1", "none:1").referrers(Referrers::None);
    let report = none.done(from.registry(), to.registry()).await?;
    none.after(&report).done(from.registry(), to.registry()).await?;
    for route in [Route::Referrers, Route::Tags] {
        let asked = from.count(&Matcher::new().route(route)) + to.count(&Matcher::new().route(route));
        ensure!(asked == 0, "{route:?} was asked for {asked} times");
    }
    ensure!(listed(target.registry(), true, "none", &attached.image.root).await?.is_empty());

    let selected = Referrers::Selected(vec![SIGNATURE.into()]);
    Direct::of("a:1", "some:1").referrers(selected).done(source.registry(), target.registry()).await?;
    let of_root = listed(target.registry(), true, "some", &attached.image.root).await?;
    ensure!(digests(&of_root) == [signature.digest()], "{of_root:?}");
    let of_child = listed(target.registry(), true, "some", &attached.image.manifests[1]).await?;
    ensure!(digests(&of_child) == [attached.of_child.digest()], "{of_child:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_attached_later_comes_with_the_next_sync_and_the_image_is_not_copied_again() -> Result<()> {
    for kind in [Olareg, Distribution] {
        let has_api = kind == Olareg;
        let (source, target) = pair(kind, kind).await?;
        let image = Image::multi_arch(170, &[300], &["linux/amd64", "linux/arm64"]);
        client_of(source.registry())?.push("a", "1", &image).await?;
        let from = Proxy::to(Env::get(), source.registry()).start().await?;
        let to = Proxy::to(Env::get(), target.registry()).start().await?;
        let sync = Direct::of("a:1", "a:1");
        let report = sync.done(from.registry(), to.registry()).await?;
        let (sbom, signature) =
            (Image::referrer(&image.root, 171, SBOM), Image::referrer(&image.manifests[0], 172, SIGNATURE));
        attach(source.registry(), has_api, "a", &image.root, &[&sbom]).await?;
        attach(source.registry(), has_api, "a", &image.manifests[0], &[&signature]).await?;

        from.forget();
        to.forget();
        let report = sync.after(&report).done(from.registry(), to.registry()).await?;
        ensure!(report.images[0].action == Some(Action::Unchanged), "{report:?}");
        for (subject, referrer) in [(&image.root, &sbom), (&image.manifests[0], &signature)] {
            let entries = listed(target.registry(), has_api, "a", subject).await?;
            ensure!(is_listed(&entries, referrer), "{kind:?}: {entries:?}");
            ensure!(client_of(target.registry())?.holds("a", referrer.digest(), referrer).await?);
        }
        let of_image: Vec<&String> = image.blobs.iter().map(|blob| &blob.digest).collect();
        let touched = |proxy: &Proxy| {
            let requests = proxy.requests();
            requests
                .iter()
                .filter(|request| request.key.reference.as_ref().is_some_and(|it| of_image.contains(&it)))
                .count()
        };
        ensure!(touched(&from) == 0 && touched(&to) == 0, "{kind:?}: blobs of the image were asked for");
        let tagged = to.count(&Matcher::new().method("PUT").route(Route::Manifest).reference("1"));
        ensure!(tagged == 0, "{kind:?}: the tag was written again");
    }
    Ok(())
}

#[tokio::test]
async fn more_than_any_image_has_attached_is_refused() -> Result<()> {
    let env = Env::get();
    let (name, target) = (prefix("many"), server(Distribution).await?);
    let image = Image::single(180, &[300]);
    let client = client_of(&env.source)?;
    client.push(&name, "1", &image).await?;
    let proxy = Proxy::to(env, &env.source).start().await?;
    let tag = fallback_tag(&image.root);
    client.push(&name, &tag, &Image::index_of(&[])).await?;
    let entries: Vec<Value> =
        (0..1001).map(|number| Content::new(testenv::images::OCI_MANIFEST, format!("{number}")).descriptor()).collect();
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries });
    let index = Content::new(OCI_INDEX, index.to_string());
    let answer = [Do::replace_body(index.bytes), Do::set_header("Docker-Content-Digest", &index.digest)];
    proxy.rule(Matcher::new().method("GET").route(Route::Manifest).reference(&tag), answer);
    let name_and_tag = format!("{name}:1");
    let failure = Direct::of(&name_and_tag, &name_and_tag).fails(proxy.registry(), target.registry()).await?;
    ensure!(failure.0 == Reason::ManifestRefused && failure.1.contains("more than 1000"), "{failure:?}");
    Ok(())
}

#[tokio::test]
async fn a_list_of_referrers_that_does_not_end_is_left() -> Result<()> {
    let (source, target) = pair(Olareg, Distribution).await?;
    client_of(source.registry())?.push("a", "1", &Image::single(182, &[300])).await?;
    let proxy = Proxy::to(Env::get(), source.registry()).start().await?;
    let referrers = Matcher::new().route(Route::Referrers);
    let page = [vec![b' '; 3 << 20], Image::index_of(&[]).root.bytes.to_vec()].concat();
    for number in 0..9 {
        let next = format!("<?page={number}>; rel=\"next\"");
        proxy.rule(referrers.clone().times(1), Do::respond(200).header("Link", &next).body(page.clone()));
    }
    let (reason, message) = Direct::of("a:1", "a:1").fails(proxy.registry(), target.registry()).await?;
    ensure!(reason == Reason::SourceUnavailable && message.contains("larger than"), "{reason}: {message}");
    ensure!(proxy.count(&referrers) == 2, "{} pages were read", proxy.count(&referrers));
    Ok(())
}

#[tokio::test]
async fn something_else_under_the_fallback_tag_is_no_list() -> Result<()> {
    let (source, target) = pair(Distribution, Distribution).await?;
    let (image, other) = (Image::single(190, &[300]), Image::single(191, &[300]));
    let client = client_of(source.registry())?;
    client.push("a", "1", &image).await?;
    client.push("a", &fallback_tag(&image.root), &other).await?;
    Direct::of("a:1", "a:1").done(source.registry(), target.registry()).await?;
    ensure!(client_of(target.registry())?.tags("a").await? == ["1"]);
    Ok(())
}

#[tokio::test]
async fn referrers_that_list_each_other_end() -> Result<()> {
    let (source, target) = pair(Distribution, Distribution).await?;
    let image = Image::single(195, &[300]);
    let (a, b) = (Image::referrer(&image.root, 196, SBOM), Image::referrer(&image.root, 197, SBOM));
    let client = client_of(source.registry())?;
    client.push("a", "1", &image).await?;
    attach(source.registry(), false, "a", &image.root, &[&a, &b]).await?;
    // Only a list under a tag can say what digests cannot.
    client.push("a", &fallback_tag(&a.root), &Image::fallback_index(&[&b])).await?;
    client.push("a", &fallback_tag(&b.root), &Image::fallback_index(&[&a])).await?;
    Direct::of("a:1", "a:1").done(source.registry(), target.registry()).await?;
    Ok(())
}

#[tokio::test]
async fn an_artifact_that_lists_what_it_is_attached_to_ends() -> Result<()> {
    let (source, target) = pair(Olareg, Olareg).await?;
    let image = Image::single(198, &[300]);
    let listing = Image::index_of(&[(&image, json!({}))])
        .with_fields(&json!({ "subject": image.root.descriptor(), "artifactType": SBOM }));
    let client = client_of(source.registry())?;
    client.push("a", "1", &image).await?;
    client.put_manifest("a", listing.digest(), &listing.root).await?;
    Direct::of("a:1", "a:1").done(source.registry(), target.registry()).await?;
    ensure!(client_of(target.registry())?.holds("a", listing.digest(), &listing).await?);
    Ok(())
}
