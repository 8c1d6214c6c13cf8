//! Every form of manifest from every place that holds it to every place that takes it, byte for byte; and what is said
//! where a registry does not take it.

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, stream};
use imagemirror::{
    copy::{CopyOptions, ForeignLayers},
    reason::Reason,
    registry::Layout,
};
use serde_json::json;
use testenv::{
    Content, Env, Image, Proxy, RegistryServer,
    artifacts::EMPTY,
    images::{DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST},
    proxy::{Matcher, Route},
    registry::{
        Kind::{self, Crane, Distribution, Distribution2, Olareg},
        RegistryOptions,
    },
    witness::{crane_validate, regctl_reads},
};

use crate::direct::{Direct, Directory, HOST, Place, client_of, prefix, server};

/// Copies that run side by side.
const AT_ONCE: usize = 8;

/// Which registries refuse a form, and what the message must name.
type Refused = (&'static [Kind], &'static str);

const TAKEN: Refused = (&[], "");
const URLS: &str = "validation.manifests.urls.allow";
const INDEXES: &str = "validation.manifests.indexes.platforms: none";
const TYPE: &str = "takes no manifests of this type";

fn forms() -> Vec<(&'static str, Image, Refused)> {
    let seed = fastrand::u64(..);
    let nowhere = Content::new(OCI_MANIFEST, "nowhere");
    let single = Image::single(seed, &[300]);
    let index = Image::multi_arch(seed, &[300, 70_000], &["linux/amd64", "linux/arm/v7"]);
    let nested = Image::index_of(&[(&index, json!({})), (&single, json!({ "annotations": { "a": "b" } }))]);
    let extended = single.clone().with_fields(&json!({ "x-unknown": { "a": [1, null] }, "annotations": { "k": "ü" } }));
    let artifact = Image::artifact(seed, "application/x");
    let of_type = |config: &str, layer: &str| manifest_of(config, layer, seed);
    let docker = Image::docker(seed, &[300], &["linux/amd64", "linux/arm64"]);
    let old_types: Refused = (&[Distribution, Distribution2, Olareg], TYPE);
    vec![
        ("oci-index", index.clone(), TAKEN),
        ("oci", single.clone(), TAKEN),
        ("docker-list", docker.clone(), TAKEN),
        ("docker", only(&docker), TAKEN),
        ("nested-twice", Image::index_of(&[(&nested, json!({}))]), TAKEN),
        ("nested", nested, TAKEN),
        ("empty-index", Image::index_of(&[]), TAKEN),
        ("index-with-artifact", Image::index_of(&[(&artifact, json!({}))]), TAKEN),
        ("index-with-blob", Image::index_with_blob(seed), (&[Distribution], INDEXES)),
        ("attestations", index.with_attestations(seed), TAKEN),
        ("artifact-with-data", artifact.clone(), TAKEN),
        ("artifact-without-content", without_content(), TAKEN),
        ("artifact-manifest", Image::artifact_manifest(seed, "application/x"), old_types),
        (
            "chart",
            of_type("application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip"),
            TAKEN,
        ),
        ("wasm", of_type("application/vnd.wasm.config.v0+json", "application/wasm"), TAKEN),
        ("sbom", of_type(EMPTY, "application/spdx+json"), TAKEN),
        ("missing-subject", Image::referrer(&nowhere, seed, "application/x"), TAKEN),
        ("subject-of-an-index", Image::index_of(&[]).with_fields(&json!({ "subject": nowhere.descriptor() })), TAKEN),
        (
            "foreign-layer",
            Image::with_foreign_layer(seed, "https://example.org/layer"),
            (&[Distribution, Distribution2], URLS),
        ),
        ("schema-1", Image::schema_1(seed), (&[Distribution, Distribution2, Olareg], "compatibility.schema1.enabled")),
        (
            "sha512",
            Image::sha512(seed, &["linux/amd64", "linux/arm/v7"]),
            (&[Distribution, Distribution2], "olareg takes them"),
        ),
        ("unknown-type", Image::unknown(seed), old_types),
        ("unknown-fields", extended, TAKEN),
        ("white-space", single.clone().spaced(), TAKEN),
        ("empty-layer", Image::single(seed, &[0, 10]), TAKEN),
        ("no-layers", Image::single(seed, &[]), TAKEN),
    ]
}

/// The first manifest of an index alone.
fn only(index: &Image) -> Image {
    let root = index.manifests[0].clone();
    let blobs = index.blobs.iter().filter(|blob| String::from_utf8_lossy(&root.bytes).contains(&blob.digest));
    Image { manifests: Vec::new(), blobs: blobs.cloned().collect(), root }
}

fn manifest_of(config: &str, layer: &str, seed: u64) -> Image {
    let config = Content::new(config, "{}");
    let layer = Content::new(layer, format!("layer {seed}"));
    let fields = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.descriptor(), "layers": [layer.descriptor()],
    });
    Image { root: Content::new(OCI_MANIFEST, fields.to_string()), manifests: Vec::new(), blobs: vec![config, layer] }
}

/// What the image specification says to write where there is nothing to say but the type.
fn without_content() -> Image {
    let empty = Content::new(EMPTY, "{}");
    let fields = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "application/x",
        "config": empty.descriptor(), "layers": [empty.descriptor()], "annotations": { "a": "b" },
    });
    Image { root: Content::new(OCI_MANIFEST, fields.to_string()), manifests: Vec::new(), blobs: vec![empty] }
}

/// A place that takes part: a registry, or a directory.
enum Stop {
    Registry(Kind, Box<RegistryServer>),
    Directory(Directory, Layout),
}

impl Stop {
    fn name(&self) -> String {
        match self {
            Self::Registry(kind, _) => format!("{kind:?}"),
            Self::Directory(..) => "a directory".to_owned(),
        }
    }

    fn place(&self) -> Place<'_> {
        match self {
            Self::Registry(_, server) => server.registry().into(),
            Self::Directory(_, layout) => layout.into(),
        }
    }

    fn refuses(&self, (kinds, _): Refused) -> bool {
        matches!(self, Self::Registry(kind, _) if kinds.contains(kind))
    }

    async fn holds(&self, name: &str, repository: &str, image: &Image) -> Result<bool> {
        match self {
            Self::Registry(_, server) => client_of(server.registry())?.holds(repository, "1", image).await,
            // There it has the name of its source.
            Self::Directory(directory, _) => directory.holds(&format!("{HOST}/{name}:1"), image),
        }
    }
}

/// From where everything is to this place, and from there back to where everything is taken.
async fn there_and_back(
    all: &RegistryServer,
    stop: &Stop,
    repository: &str,
    image: &Image,
    refused: Refused,
) -> Result<()> {
    let to = format!("{repository}/to");
    let there = Direct::of(&format!("{repository}:1"), &format!("{to}:1")).called(HOST);
    if stop.refuses(refused) {
        let (reason, message) = there.fails(all.registry(), stop.place()).await?;
        ensure!(reason == Reason::ManifestRefused && message.contains(refused.1), "{reason}: {message}");
        return Ok(());
    }
    there.done(all.registry(), stop.place()).await?;
    ensure!(stop.holds(repository, &to, image).await?, "it is not the same there");
    let (from, back) = match stop {
        Stop::Registry(..) => (to, format!("{repository}/back-{}", stop.name().to_lowercase())),
        Stop::Directory(..) => (repository.to_owned(), format!("{repository}/back")),
    };
    Direct::of(&format!("{from}:1"), &format!("{back}:1")).done(stop.place(), all.registry()).await?;
    ensure!(client_of(all.registry())?.holds(&back, "1", image).await?, "it is not the same on the way back");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_form_goes_from_every_place_to_every_place_that_takes_it() -> Result<()> {
    let all = server(Crane).await?;
    let mut stops = Vec::new();
    for kind in [Distribution, Distribution2, Olareg] {
        stops.push(Stop::Registry(kind, Box::new(server(kind).await?)));
    }
    let directory = Directory::new()?;
    let layout = directory.layout()?;
    stops.push(Stop::Directory(directory, layout));
    let (prefix, forms) = (prefix("forms"), forms());
    let mut cases = Vec::new();
    for (form, image, refused) in &forms {
        let repository = format!("{prefix}/{form}");
        client_of(all.registry())?.push(&repository, "1", image).await.context(*form)?;
        for stop in &stops {
            let (all, repository) = (&all, repository.clone());
            cases.push(async move {
                let case = there_and_back(all, stop, &repository, image, *refused).await;
                case.with_context(|| format!("{form} by way of {}", stop.name()))
            });
        }
    }
    let total = cases.len();
    let outcomes: Vec<Result<()>> = stream::iter(cases).buffer_unordered(AT_ONCE).collect().await;
    let failed: Vec<String> = outcomes.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(failed.is_empty(), "{} of {total} cases failed:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}

#[tokio::test]
async fn the_settings_that_messages_name_let_the_forms_in() -> Result<()> {
    let validation = json!({ "validation": { "manifests": {
        "urls": { "allow": ["^https://example\\.org/"] }, "indexes": { "platforms": "none" },
    } } });
    let options = RegistryOptions { tls: false, extra: validation, ..RegistryOptions::default() };
    let (target, source) = (RegistryServer::start(Env::get(), options).await?, server(Crane).await?);
    for (name, image) in [
        ("foreign", Image::with_foreign_layer(11, "https://example.org/layer")),
        ("with-blob", Image::index_with_blob(12)),
    ] {
        client_of(source.registry())?.push(name, "1", &image).await?;
        let name_and_tag = format!("{name}:1");
        Direct::of(&name_and_tag, &name_and_tag).done(source.registry(), target.registry()).await?;
        ensure!(client_of(target.registry())?.holds(name, "1", &image).await?, "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn layers_of_vendors_stay_where_they_are_unless_they_are_wanted() -> Result<()> {
    let (source, target) = (server(Crane).await?, server(Olareg).await?);
    let mut image = Image::with_foreign_layer(21, "https://example.org/layer");
    let layer = Content::new("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "a foreign layer");
    let mut descriptor = layer.descriptor();
    descriptor["urls"] = json!(["https://example.org/layer"]);
    image = image.with_fields(&json!({ "layers": [descriptor] }));
    ensure!(image.root.media_type == DOCKER_MANIFEST);
    let client = client_of(source.registry())?;
    client.put_blob("a", &layer).await?;
    client.push("a", "1", &image).await?;
    let proxy = Proxy::to(Env::get(), source.registry()).start().await?;
    let layers = Matcher::new().route(Route::Blob).reference(&layer.digest);
    for (policy, to, is_there) in [(ForeignLayers::Skip, "skipped", false), (ForeignLayers::Copy, "copied", true)] {
        let options = CopyOptions { foreign_layers: policy, ..CopyOptions::default() };
        let copy = Direct::of("a:1", &format!("{to}:1")).options(options);
        copy.done(proxy.registry(), target.registry()).await?;
        let found = client_of(target.registry())?.blob(to, &layer.digest).await?;
        ensure!(found.is_some() == is_there, "{policy:?}");
        ensure!((proxy.count(&layers) > 0) == is_there, "{policy:?}");
    }
    Ok(())
}

#[tokio::test]
async fn what_can_be_read_in_two_ways_is_not_copied() -> Result<()> {
    let (source, target) = (server(Crane).await?, server(Crane).await?);
    let client = client_of(source.registry())?;
    let descriptor = Content::new(OCI_MANIFEST, "x").descriptor();
    for (name, media_type, text) in [
        ("both", OCI_INDEX, format!(r#"{{"schemaVersion":2,"manifests":[],"layers":[{descriptor}]}}"#)),
        ("twice", OCI_INDEX, r#"{"schemaVersion":2,"manifests":[],"manifests":[]}"#.to_owned()),
        ("other-type", OCI_INDEX, format!(r#"{{"mediaType":"{OCI_MANIFEST}","manifests":[]}}"#)),
        ("nothing", "application/vnd.example.thing.v1+json", r#"{"a":1}"#.to_owned()),
    ] {
        client.put_manifest(name, "1", &Content::new(media_type, text)).await?;
        let name_and_tag = format!("{name}:1");
        let failure = Direct::of(&name_and_tag, &name_and_tag).fails(source.registry(), target.registry()).await?;
        ensure!(failure.0 == Reason::ManifestRefused, "{name}: {failure:?}");
        ensure!(client_of(target.registry())?.tags(name).await?.is_empty(), "{name} was written");
    }
    Ok(())
}

#[tokio::test]
async fn an_image_with_a_gap_is_said_to_have_one_and_its_tag_is_not_written() -> Result<()> {
    let env = Env::get();
    let image = Image::multi_arch(31, &[300], &["linux/amd64", "linux/arm64"]);
    let prefix = prefix("gap");
    for (case, missing) in [image.manifests[1].digest.clone(), image.blobs[1].digest.clone()].into_iter().enumerate() {
        let directory = Directory::new()?;
        let layout = directory.layout()?;
        let source = server(Crane).await?;
        client_of(source.registry())?.push("a", "1", &image).await?;
        Direct::of("a:1", "a:1").called(HOST).done(source.registry(), &layout).await?;
        std::fs::remove_file(directory.blob_path(&missing))?;
        let to = format!("{prefix}/{case}");
        let failure = Direct::of("a:1", &format!("{to}:1")).fails(&layout, &env.open).await?;
        ensure!(failure.0 == Reason::SourceIncomplete && failure.1.contains(&missing), "{failure:?}");
        ensure!(client_of(&env.open)?.digest_of(&to, "1").await?.is_none());
    }
    Ok(())
}

#[tokio::test]
async fn deep_nesting_is_refused_and_wide_nesting_costs_each_manifest_once() -> Result<()> {
    let (source, target) = (server(Crane).await?, server(Olareg).await?);
    let client = client_of(source.registry())?;
    let proxy = Proxy::to(Env::get(), source.registry()).start().await?;
    // Each level lists the one below ten times: ten million ways to the image at the bottom, eight manifests.
    let mut bomb = Image::single(41, &[10]);
    for _ in 0..7 {
        bomb = Image::index_of(&[(); 10].map(|()| (&bomb, json!({}))));
    }
    client.push("bomb", "1", &bomb).await?;
    Direct::of("bomb:1", "bomb:1").done(proxy.registry(), target.registry()).await?;
    ensure!(client_of(target.registry())?.holds("bomb", "1", &bomb).await?);
    let mut manifests: Vec<_> = proxy.requests().into_iter().filter(|get| get.key.route == Route::Manifest).collect();
    manifests.retain(|get| get.key.reference.as_ref().is_some_and(|reference| reference.starts_with("sha256:")));
    ensure!(manifests.len() == 7, "{} manifests were read", manifests.len());

    for _ in 0..3 {
        bomb = Image::index_of(&[(&bomb, json!({}))]);
    }
    client.push("deep", "1", &bomb).await?;
    let failure = Direct::of("deep:1", "deep:1").fails(source.registry(), target.registry()).await?;
    ensure!(failure.0 == Reason::ManifestRefused && failure.1.contains("nested more than 8 deep"), "{failure:?}");
    Ok(())
}

#[tokio::test]
async fn others_can_read_what_was_copied() -> Result<()> {
    let (env, name) = (Env::get(), prefix("witness"));
    let image = Image::archives(51, &[3000, 50_000], &["linux/amd64", "linux/arm64"])?;
    client_of(&env.source)?.push(&name, "1", &image).await?;
    let (olareg, old) = (server(Olareg).await?, server(Distribution2).await?);
    for target in [&env.open, old.registry(), olareg.registry()] {
        let name_and_tag = format!("{name}:1");
        Direct::of(&name_and_tag, &name_and_tag).done(&env.source, target).await?;
        crane_validate(env, target, &name, "1", true).await?;
        regctl_reads(env, target, &name, "1").await?;
        let config = oci_client::client::ClientConfig {
            protocol: oci_client::client::ClientProtocol::Http,
            ..Default::default()
        };
        let reference: oci_client::Reference = format!("{}/{name}:1", target.host).parse()?;
        let client = oci_client::Client::new(config);
        let digest = client.fetch_manifest_digest(&reference, &oci_client::secrets::RegistryAuth::Anonymous).await?;
        ensure!(digest == image.digest(), "{digest}");
    }
    Ok(())
}
