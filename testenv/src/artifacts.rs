//! The forms of manifests beyond plain images: nested and odd indexes, artifacts, referrers and the tags that stand in
//! for them, attestations, foreign layers, schema 1, sha512, unknown types. All are deterministic from a seed.
//!
//! [`Client::push`](crate::Client::push) takes every one of them, as a tag or, with [`Image::digest`], without one. What
//! the registries say to each form is in `testenv/tests/it/forms.rs`.

use anyhow::Result;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::gzip::gzip;
use crate::images::{Content, Image, OCI_INDEX, OCI_MANIFEST, platform, tar_of};

pub const ARTIFACT_MANIFEST: &str = "application/vnd.oci.artifact.manifest.v1+json";
pub const SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";
pub const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const BLOB_SIZE: usize = 2000;

/// Indexes.
impl Image {
    /// An OCI index of images whose layers are compressed archives, each of one random file of so many bytes: for whoever
    /// unpacks them, such as [`crane_validate`](crate::witness::crane_validate).
    pub fn archives(seed: u64, files: &[usize], platforms: &[&str]) -> Result<Self> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut children = Vec::new();
        for text in platforms {
            let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
            for size in files {
                let mut bytes = vec![0; *size];
                random.fill(&mut bytes);
                let archive = tar_of("file", &bytes)?;
                layers.push(Content::new("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&archive)));
                diff_ids.push(Content::new("", archive).digest);
            }
            let platform = platform(text);
            let rootfs = json!({ "config": {}, "rootfs": { "type": "layers", "diff_ids": diff_ids } });
            let config = Content::new(CONFIG, merged(rootfs, &platform).to_string());
            let descriptors: Vec<Value> = layers.iter().map(Content::descriptor).collect();
            let fields = json!({ "config": config.descriptor(), "layers": descriptors });
            let blobs = [config].into_iter().chain(layers).collect();
            children.push((manifest(OCI_MANIFEST, &fields, blobs), json!({ "platform": platform })));
        }
        Ok(Self::index_of(&children.iter().map(|(image, fields)| (image, fields.clone())).collect::<Vec<_>>()))
    }

    /// An OCI index that lists the roots of `children`, each descriptor with these further fields (`{}` for none). With
    /// indexes as children it is a nested index; without children an empty one.
    #[must_use]
    pub fn index_of(children: &[(&Image, Value)]) -> Self {
        let mut index = Self { root: Content::new(OCI_INDEX, ""), manifests: Vec::new(), blobs: Vec::new() };
        let mut entries = Vec::new();
        for (child, fields) in children {
            entries.push(merged(child.root.descriptor(), fields));
            let manifests = child.manifests.iter().chain([&child.root]);
            add_new(&mut index.manifests, manifests);
            add_new(&mut index.blobs, &child.blobs);
        }
        let root = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries });
        index.root = Content::new(OCI_INDEX, root.to_string());
        index
    }

    /// An index that lists a blob beside the manifest of an image.
    #[must_use]
    pub fn index_with_blob(seed: u64) -> Self {
        let blob = noise("application/octet-stream", seed, BLOB_SIZE);
        let mut index = Self::index_of(&[(&Self::single(seed, &[BLOB_SIZE]), json!({}))]);
        let mut entries = index.json()["manifests"].clone();
        if let Some(entries) = entries.as_array_mut() {
            entries.push(blob.descriptor());
        }
        index.blobs.push(blob);
        index.with_fields(&json!({ "manifests": entries }))
    }

    /// The index with one attestation for each of its manifests, as buildx writes them.
    #[must_use]
    pub fn with_attestations(self, seed: u64) -> Self {
        let mut entries = self.json()["manifests"].as_array().cloned().unwrap_or_default();
        let mut index = self;
        for (number, manifest) in index.manifests.clone().iter().enumerate() {
            let statement = noise("application/vnd.in-toto+json", seed.wrapping_add(number as u64), BLOB_SIZE);
            let mut layer = statement.descriptor();
            layer["annotations"] = json!({ "in-toto.io/predicate-type": "https://slsa.dev/provenance/v0.2" });
            let config = json!({
                "architecture": "unknown", "os": "unknown", "config": {},
                "rootfs": { "type": "layers", "diff_ids": [statement.digest] },
            });
            let config = Content::new(CONFIG, config.to_string());
            let attestation = json!({
                "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.descriptor(), "layers": [layer],
            });
            let attestation = Content::new(OCI_MANIFEST, attestation.to_string());
            let fields = json!({
                "platform": { "architecture": "unknown", "os": "unknown" },
                "annotations": {
                    "vnd.docker.reference.type": "attestation-manifest",
                    "vnd.docker.reference.digest": manifest.digest,
                },
            });
            entries.push(merged(attestation.descriptor(), &fields));
            add_new(&mut index.manifests, [&attestation]);
            add_new(&mut index.blobs, [&config, &statement]);
        }
        index.with_fields(&json!({ "manifests": entries }))
    }
}

/// Artifacts, and what refers to an image.
impl Image {
    /// An artifact in today's form: a manifest with the empty configuration, which carries its `data`.
    #[must_use]
    pub fn artifact(seed: u64, artifact_type: &str) -> Self {
        let config = Content::new(EMPTY, "{}");
        let mut descriptor = config.descriptor();
        descriptor["data"] = BASE64_STANDARD.encode(&config.bytes).into();
        let layer = noise("application/octet-stream", seed, BLOB_SIZE);
        let fields = json!({ "artifactType": artifact_type, "config": descriptor, "layers": [layer.descriptor()] });
        manifest(OCI_MANIFEST, &fields, vec![config, layer])
    }

    /// An artifact manifest as there was before OCI 1.1: `blobs` and no configuration.
    #[must_use]
    pub fn artifact_manifest(seed: u64, artifact_type: &str) -> Self {
        let blob = noise("application/octet-stream", seed, BLOB_SIZE);
        let fields =
            json!({ "mediaType": ARTIFACT_MANIFEST, "artifactType": artifact_type, "blobs": [blob.descriptor()] });
        Self { root: Content::new(ARTIFACT_MANIFEST, fields.to_string()), manifests: Vec::new(), blobs: vec![blob] }
    }

    /// An artifact, such as a signature or an SBOM, whose `subject` is `subject`; push it by its digest.
    #[must_use]
    pub fn referrer(subject: &Content, seed: u64, artifact_type: &str) -> Self {
        Self::artifact(seed, artifact_type)
            .with_fields(&json!({ "subject": subject.descriptor(), "annotations": { "seed": seed.to_string() } }))
    }

    /// The index of the referrers tag schema with all of `referrers`: it belongs to [`fallback_tag`] of their subject.
    #[must_use]
    pub fn fallback_index(referrers: &[&Image]) -> Self {
        let children: Vec<_> = referrers
            .iter()
            .map(|referrer| {
                let json = referrer.json();
                let fields = json!({ "artifactType": json["artifactType"], "annotations": json["annotations"] });
                (*referrer, fields)
            })
            .collect();
        Self::index_of(&children)
    }

    /// A signature as cosign pushes it beside an image, under [`cosign_tag`].
    #[must_use]
    pub fn cosign_signature(signed: &Content, seed: u64) -> Self {
        let payload = json!({
            "critical": { "image": { "docker-manifest-digest": signed.digest }, "type": "cosign container image signature" },
            "optional": { "seed": seed },
        });
        let layer = Content::new("application/vnd.dev.cosign.simplesigning.v1+json", payload.to_string());
        let mut descriptor = layer.descriptor();
        let signature = BASE64_STANDARD.encode(&noise("", seed, 70).bytes);
        descriptor["annotations"] = json!({ "dev.cosignproject.cosign/signature": signature });
        let config = json!({
            "architecture": "", "os": "", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
        });
        let config = Content::new(CONFIG, config.to_string());
        let fields = json!({ "config": config.descriptor(), "layers": [descriptor] });
        manifest(OCI_MANIFEST, &fields, vec![config, layer])
    }
}

/// Unusual manifests.
impl Image {
    /// A Docker manifest whose last layer is elsewhere, at `url`, and must not be copied.
    #[must_use]
    pub fn with_foreign_layer(seed: u64, url: &str) -> Self {
        let mut image = Self::docker(seed, &[BLOB_SIZE], &["windows/amd64"]);
        if let Some(manifest) = image.manifests.pop() {
            image.root = manifest;
        }
        let mut foreign = noise("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", seed, 1).descriptor();
        foreign["urls"] = json!([url]);
        let mut layers = image.json()["layers"].clone();
        if let Some(layers) = layers.as_array_mut() {
            layers.push(foreign);
        }
        image.with_fields(&json!({ "layers": layers }))
    }

    /// A Docker manifest of schema 1, without a signature.
    #[must_use]
    pub fn schema_1(seed: u64) -> Self {
        let layer = noise("application/octet-stream", seed, BLOB_SIZE);
        let history =
            json!({ "architecture": "amd64", "os": "linux", "id": layer.digest.trim_start_matches("sha256:") });
        let manifest = json!({
            "schemaVersion": 1, "name": "old/image", "tag": "latest", "architecture": "amd64",
            "fsLayers": [{ "blobSum": layer.digest }],
            "history": [{ "v1Compatibility": history.to_string() }],
        });
        Self { root: Content::new(SCHEMA_1, manifest.to_string()), manifests: Vec::new(), blobs: vec![layer] }
    }

    /// An OCI index whose manifests and blobs all have sha512 digests; itself it has a sha256 digest, as tags do.
    #[must_use]
    pub fn sha512(seed: u64, platforms: &[&str]) -> Self {
        let mut children = Vec::new();
        for (number, text) in platforms.iter().enumerate() {
            let image = Self::single(seed.wrapping_add(number as u64), &[BLOB_SIZE]);
            let blobs: Vec<Content> = image.blobs.iter().map(Content::with_sha512).collect();
            let layers: Vec<Value> = blobs.iter().skip(1).map(Content::descriptor).collect();
            let config = blobs.first().map(Content::descriptor);
            let mut image = manifest(OCI_MANIFEST, &json!({ "config": config, "layers": layers }), blobs);
            image.root = image.root.with_sha512();
            children.push((image, json!({ "platform": platform(text) })));
        }
        Self::index_of(&children.iter().map(|(image, fields)| (image, fields.clone())).collect::<Vec<_>>())
    }

    /// A manifest of a type that nobody knows, whose configuration and layer are of such types too.
    #[must_use]
    pub fn unknown(seed: u64) -> Self {
        let config = Content::new("application/vnd.example.settings.v1+json", json!({ "seed": seed }).to_string());
        let layer = noise("application/vnd.example.data.v1", seed, BLOB_SIZE);
        let fields = json!({ "config": config.descriptor(), "layers": [layer.descriptor()] });
        manifest("application/vnd.example.thing.v1+json", &fields, vec![config, layer])
    }

    /// With these fields of the root replaced or added: a `subject`, something that no specification knows.
    #[must_use]
    pub fn with_fields(self, fields: &Value) -> Self {
        let text = merged(self.json(), fields).to_string();
        self.with_text(text)
    }

    /// With white space in the root's JSON, in the middle and at both ends, that only survives where bytes are kept.
    #[must_use]
    pub fn spaced(self) -> Self {
        let text = format!(" \n{:#}\r\n\t ", self.json()).replace(": ", " :  ");
        self.with_text(text)
    }

    /// With another text as the root, of the same type.
    #[must_use]
    pub fn with_text(self, text: impl Into<bytes::Bytes>) -> Self {
        Self { root: Content::new(&self.root.media_type, text), ..self }
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.root.bytes).unwrap_or_default()
    }
}

/// The tag that stands in for the referrers API: `sha256-<hex>` (distribution specification, "Referrers Tag Schema").
#[must_use]
pub fn fallback_tag(subject: &Content) -> String {
    subject.digest.replacen(':', "-", 1)
}

/// `sha256-<hex>.sig`; other suffixes are `att` and `sbom`.
#[must_use]
pub fn cosign_tag(subject: &Content, suffix: &str) -> String {
    format!("{}.{suffix}", fallback_tag(subject))
}

fn manifest(media_type: &str, fields: &Value, blobs: Vec<Content>) -> Image {
    let root = merged(json!({ "schemaVersion": 2, "mediaType": media_type }), fields);
    Image { root: Content::new(media_type, root.to_string()), manifests: Vec::new(), blobs }
}

fn noise(media_type: &str, seed: u64, size: usize) -> Content {
    let mut bytes = vec![0; size];
    // Not the bytes of an image with the same seed.
    fastrand::Rng::with_seed(!seed).fill(&mut bytes);
    Content::new(media_type, bytes)
}

fn merged(mut into: Value, fields: &Value) -> Value {
    if let (Some(into), Some(fields)) = (into.as_object_mut(), fields.as_object()) {
        into.extend(fields.clone());
    }
    into
}

fn add_new<'a>(all: &mut Vec<Content>, new: impl IntoIterator<Item = &'a Content>) {
    for content in new {
        if !all.contains(content) {
            all.push(content.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nested_index_has_its_manifests_children_first() {
        let inner = Image::multi_arch(1, &[10], &["linux/amd64", "linux/arm64"]);
        let outer = Image::index_of(&[(&inner, json!({})), (&Image::single(2, &[10]), json!({}))]);
        assert_eq!(outer.manifests.len(), 4);
        assert_eq!(outer.manifests[2].digest, inner.digest());
        assert_eq!(Image::index_of(&[]).json()["manifests"], json!([]));
    }

    #[test]
    fn attestations_name_what_they_are_about() {
        let image = Image::multi_arch(1, &[10], &["linux/amd64", "linux/arm/v7"]);
        let attested = image.clone().with_attestations(2).json();
        let entries = attested["manifests"].as_array().unwrap();
        assert_eq!(entries.len(), 4);
        assert_eq!(entries[1]["platform"]["variant"], "v7");
        assert_eq!(entries[3]["annotations"]["vnd.docker.reference.digest"], image.manifests[1].digest);
    }

    #[test]
    fn white_space_changes_the_digest_and_not_the_meaning() {
        let image = Image::single(1, &[10]);
        let spaced = image.clone().spaced();
        assert_ne!(image.digest(), spaced.digest());
        assert_eq!(image.json(), spaced.json());
    }
}
