//! Some platforms of an image: the index rewritten to list what is kept and nothing else, the same way every time.

use futures::{FutureExt as _, future::BoxFuture};

use super::{CopyError, graph::MAX_DEPTH};
use crate::{
    oci::{Descriptor, Digest, ManifestError, Platform, PlatformFilter, RawDescriptor, RawIndex, RawManifest},
    registry::{BlobOpener, Source},
};

/// What is copied: the manifest that the tag gets, and the manifests under it that exist nowhere yet.
#[derive(Clone, Debug)]
pub struct Root {
    /// What the tag gets.
    pub manifest: RawManifest,
    /// Indexes inside that had to be rewritten too.
    pub rewritten: Vec<RawManifest>,
    /// What the source has under the name.
    pub source_digest: Digest,
}

/// What marks an attestation in an index, and which image it is about (`BuildKit`, attestation storage).
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";
/// Configurations are read this far.
const MAX_CONFIG: u64 = 4 << 20;

impl Root {
    /// The whole of what the source has.
    #[must_use]
    pub fn whole(manifest: RawManifest) -> Self {
        Self { source_digest: manifest.digest.clone(), manifest, rewritten: Vec::new() }
    }

    /// Whether it is what the source has.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.manifest.digest == self.source_digest
    }

    /// The platforms of `manifest` that one of `filters` keeps, with the attestations that are about them.
    ///
    /// An index of which everything is kept stays as it is; one of which one platform is kept stays an index. A single
    /// image is kept or not by its configuration; what has no platform there, such as a chart, is kept.
    pub async fn subset(source: &Source, manifest: RawManifest, filters: &[PlatformFilter]) -> Result<Self, CopyError> {
        let subject = format!("{}@{}", source.place(), manifest.digest);
        let source_digest = manifest.digest.clone();
        let mut subset = Subset { source, filters, subject, rewritten: Vec::new() };
        if !manifest.is_index() {
            subset.check_single(&manifest).await?;
            return Ok(Self::whole(manifest));
        }
        let Some(manifest) = subset.index(manifest, 0).await? else { return Err(subset.missing()) };
        Ok(Self { manifest, rewritten: subset.rewritten, source_digest })
    }
}

struct Subset<'a> {
    source: &'a Source,
    filters: &'a [PlatformFilter],
    subject: String,
    rewritten: Vec<RawManifest>,
}

impl Subset<'_> {
    fn keeps(&self, platform: &Platform) -> bool {
        self.filters.iter().any(|filter| filter.keeps(platform))
    }

    /// The index without what is not kept; `None` if nothing is left.
    fn index(&mut self, manifest: RawManifest, depth: u32) -> BoxFuture<'_, Result<Option<RawManifest>, CopyError>> {
        async move {
            if depth > MAX_DEPTH {
                let what = format!("its indexes are nested more than {MAX_DEPTH} deep");
                return Err(CopyError::Bounds { subject: self.subject.clone(), what });
            }
            // Refuses what can be read in two ways, before it is read in one.
            manifest.children().map_err(|error| self.refused(error))?;
            let json = |error| self.refused(ManifestError::Json(error));
            let mut index = RawIndex::parse(&manifest.bytes).map_err(json)?;
            let mut kept: Vec<Option<RawDescriptor>> = Vec::new();
            for entry in &index.manifests {
                kept.push(self.entry(entry, depth).await?);
            }
            let images: Vec<Digest> = kept.iter().flatten().map(|entry| entry.descriptor.digest.clone()).collect();
            for (entry, kept) in index.manifests.iter().zip(&mut kept) {
                if is_attestation_of(entry, &images) {
                    *kept = Some(entry.clone());
                }
            }
            if images.is_empty() {
                return Ok(None);
            }
            let is_unchanged = index.manifests.len() == kept.iter().flatten().count()
                && index.manifests.iter().zip(kept.iter().flatten()).all(|(a, b)| a.raw.get() == b.raw.get());
            if is_unchanged {
                return Ok(Some(manifest));
            }
            index.manifests = kept.into_iter().flatten().collect();
            let rewritten = index.to_manifest(&manifest.media_type, &manifest.digest);
            rewritten.map(Some).map_err(|error| self.refused(ManifestError::Json(error)))
        }
        .boxed()
    }

    /// The entry as it is listed in the subset.
    async fn entry(&mut self, entry: &RawDescriptor, depth: u32) -> Result<Option<RawDescriptor>, CopyError> {
        if let Some(platform) = &entry.platform {
            return Ok(self.keeps(platform).then(|| entry.clone()));
        }
        if !entry.descriptor.is_index() {
            return Ok(None);
        }
        let nested = self.source.manifest(&entry.descriptor.digest.to_string()).await.map_err(CopyError::source)?;
        let before = nested.digest.clone();
        let Some(kept) = self.index(nested, depth + 1).await? else { return Ok(None) };
        if kept.digest == before {
            return Ok(Some(entry.clone()));
        }
        let renamed = entry.naming(&kept).map_err(|error| self.refused(ManifestError::Json(error)))?;
        self.rewritten.push(kept);
        Ok(Some(renamed))
    }

    /// Checks an image that is for one platform by its configuration.
    async fn check_single(&self, manifest: &RawManifest) -> Result<(), CopyError> {
        let Some(config) = manifest.config().map_err(|error| self.refused(error))? else { return Ok(()) };
        if config.size > MAX_CONFIG || !is_image_config(&config) {
            return Ok(());
        }
        let bytes = BlobOpener::new(self.source, config).read().await.map_err(CopyError::source)?;
        match serde_json::from_slice::<Platform>(&bytes) {
            Ok(platform) if !platform.os.is_empty() && !self.keeps(&platform) => Err(self.missing()),
            _ => Ok(()),
        }
    }

    fn missing(&self) -> CopyError {
        let platforms = self.filters.iter().map(ToString::to_string).collect();
        CopyError::PlatformMissing { subject: self.subject.clone(), platforms }
    }

    fn refused(&self, error: ManifestError) -> CopyError {
        CopyError::Manifest { subject: self.subject.clone(), error }
    }
}

fn is_attestation_of(entry: &RawDescriptor, images: &[Digest]) -> bool {
    let says = |key: &str| entry.annotations.get(key);
    says(REFERENCE_TYPE).is_some()
        && says(REFERENCE_DIGEST).is_some_and(|digest| images.iter().any(|image| image.to_string() == *digest))
}

/// Configurations of images name a platform; those of other artifacts are no matter of platforms.
fn is_image_config(config: &Descriptor) -> bool {
    matches!(
        config.media_type.as_str(),
        "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json"
    )
}
