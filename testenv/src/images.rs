//! Test images: deterministic from a seed, in the OCI and the Docker form, or made of real programs.

use std::path::Path;

use anyhow::{Context, Result};
use bytes::Bytes;
use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha512};

pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// A blob or a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    pub media_type: String,
    pub digest: String,
    pub bytes: Bytes,
}

impl Content {
    pub fn new(media_type: &str, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        Self { media_type: media_type.to_owned(), digest, bytes }
    }

    /// The same under its sha512 digest.
    #[must_use]
    pub fn with_sha512(&self) -> Self {
        Self { digest: format!("sha512:{}", hex(&Sha512::digest(&self.bytes))), ..self.clone() }
    }

    /// An OCI layer, not compressed.
    pub fn layer(bytes: impl Into<Bytes>) -> Self {
        Self::new(OCI.layer, bytes)
    }

    #[must_use]
    pub fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.bytes.len() })
    }
}

/// Everything that belongs to one tag.
#[derive(Clone, Debug)]
pub struct Image {
    /// What the tag points to: an index, or a manifest.
    pub root: Content,
    /// What an index points to, in its order and children first; empty for a single manifest.
    pub manifests: Vec<Content>,
    /// Configurations and layers, each once.
    pub blobs: Vec<Content>,
}

/// The media types of one form of images.
struct Form {
    list: &'static str,
    manifest: &'static str,
    config: &'static str,
    layer: &'static str,
}

const OCI: Form = Form {
    list: OCI_INDEX,
    manifest: OCI_MANIFEST,
    config: "application/vnd.oci.image.config.v1+json",
    layer: "application/vnd.oci.image.layer.v1.tar",
};
const DOCKER: Form = Form {
    list: DOCKER_LIST,
    manifest: DOCKER_MANIFEST,
    config: "application/vnd.docker.container.image.v1+json",
    layer: "application/vnd.docker.image.rootfs.diff.tar",
};

impl Image {
    /// An OCI index with one manifest a platform (`os/arch` or `os/arch/variant`), each with layers of the given sizes
    /// in bytes. The same arguments give the same bytes.
    #[must_use]
    pub fn multi_arch(seed: u64, layers: &[usize], platforms: &[&str]) -> Self {
        random(&OCI, seed, layers, platforms)
    }

    /// The same as a Docker manifest list.
    #[must_use]
    pub fn docker(seed: u64, layers: &[usize], platforms: &[&str]) -> Self {
        random(&DOCKER, seed, layers, platforms)
    }

    /// One OCI manifest without an index, for linux/amd64.
    #[must_use]
    pub fn single(seed: u64, layers: &[usize]) -> Self {
        let mut image = random(&OCI, seed, layers, &["linux/amd64"]);
        if let Some(manifest) = image.manifests.pop() {
            image.root = manifest;
        }
        image
    }

    /// An OCI index with one manifest a platform, of the layers given for each: images may share them.
    #[must_use]
    pub fn of_layers(platforms: &[(&str, Vec<Content>)]) -> Self {
        assemble(&OCI, platforms.iter().map(|(platform, layers)| part(&OCI, platform, layers.clone(), None)).collect())
    }

    /// An OCI index of images that hold real programs: for each platform the files, as (path in the image, file here),
    /// one layer a file; the first one is the entry point.
    pub fn of_programs(platforms: &[(&str, &[(&str, &Path)])]) -> Result<Self> {
        let mut parts = Vec::new();
        for (platform, files) in platforms {
            let mut layers = Vec::new();
            for (path, file) in *files {
                let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
                layers.push(Content::layer(tar_of(path, &bytes)?));
            }
            let entry_point = files.first().map(|(path, _)| format!("/{path}"));
            parts.push(part(&OCI, platform, layers, entry_point.as_deref()));
        }
        Ok(assemble(&OCI, parts))
    }

    #[must_use]
    pub fn digest(&self) -> &str {
        &self.root.digest
    }

    /// The sum of all blobs and manifests in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        let all = self.blobs.iter().chain(&self.manifests).chain([&self.root]);
        all.map(|content| content.bytes.len()).sum()
    }
}

/// A manifest with its platform and its blobs.
struct Part {
    platform: Value,
    manifest: Content,
    blobs: Vec<Content>,
}

fn random(form: &Form, seed: u64, layers: &[usize], platforms: &[&str]) -> Image {
    let mut random = fastrand::Rng::with_seed(seed);
    let parts = platforms.iter().map(|platform| {
        let layers = layers.iter().map(|size| {
            let mut bytes = vec![0; *size];
            random.fill(&mut bytes);
            Content::new(form.layer, bytes)
        });
        part(form, platform, layers.collect(), None)
    });
    assemble(form, parts.collect())
}

fn part(form: &Form, platform: &str, layers: Vec<Content>, entry_point: Option<&str>) -> Part {
    let platform = self::platform(platform);
    // Of layers that are not compressed, the digest is the diff id as well.
    let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.digest.as_str()).collect();
    let mut config = json!({ "rootfs": { "type": "layers", "diff_ids": diff_ids }, "config": {} });
    for key in ["os", "architecture", "variant"] {
        if let Some(value) = platform.get(key) {
            config[key] = value.clone();
        }
    }
    if let Some(entry_point) = entry_point {
        config["config"]["Entrypoint"] = json!([entry_point]);
    }
    let config = Content::new(form.config, config.to_string());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": form.manifest,
        "config": config.descriptor(),
        "layers": layers.iter().map(Content::descriptor).collect::<Vec<_>>(),
    });
    let manifest = Content::new(form.manifest, manifest.to_string());
    let blobs = [config].into_iter().chain(layers).collect();
    Part { platform, manifest, blobs }
}

/// `os/arch` or `os/arch/variant`.
pub(crate) fn platform(text: &str) -> Value {
    let mut names = text.splitn(3, '/');
    let mut platform = json!({ "os": names.next(), "architecture": names.next() });
    if let Some(variant) = names.next() {
        platform["variant"] = variant.into();
    }
    platform
}

fn assemble(form: &Form, parts: Vec<Part>) -> Image {
    let entries: Vec<Value> = parts
        .iter()
        .map(|part| {
            let mut entry = part.manifest.descriptor();
            entry["platform"] = part.platform.clone();
            entry
        })
        .collect();
    let root = json!({ "schemaVersion": 2, "mediaType": form.list, "manifests": entries });
    let mut image = Image { root: Content::new(form.list, root.to_string()), manifests: Vec::new(), blobs: Vec::new() };
    for part in parts {
        image.manifests.push(part.manifest);
        for blob in part.blobs {
            if !image.blobs.contains(&blob) {
                image.blobs.push(blob);
            }
        }
    }
    image
}

/// A tar archive of one executable file. Times and owners are fixed, so that the digest is too.
pub(crate) fn tar_of(path: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o755);
    header.set_mtime(0);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, path, bytes)?;
    Ok(archive.into_inner()?)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_image_and_another_gives_another() {
        let image = |seed| Image::multi_arch(seed, &[10, 2000], &["linux/amd64", "linux/arm64"]);
        assert_eq!(image(1).digest(), image(1).digest());
        assert_ne!(image(1).digest(), image(2).digest());
        assert_eq!((image(1).manifests.len(), image(1).blobs.len()), (2, 6));
    }

    #[test]
    fn a_single_image_has_no_index() {
        let image = Image::single(1, &[10]);
        assert_eq!(image.root.media_type, OCI_MANIFEST);
        assert!(image.manifests.is_empty());
    }
}
