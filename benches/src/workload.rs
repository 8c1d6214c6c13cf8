//! What is copied. W1 is three large images, so that bytes count; W2 is many tags of small layers, so that requests do.
//! The bytes are random, as compressed layers are, and the same in every run.

use std::collections::HashSet;

use anyhow::Result;
use clap::ValueEnum;
use futures::{StreamExt, TryStreamExt, stream};
use testenv::{Client, Content, Image};

const PLATFORMS: [&str; 2] = ["linux/amd64", "linux/arm64"];

/// The images of W1 with their layers for one platform, in bytes.
const LARGE: [(&str, [usize; 6]); 3] = [
    ("agent", [80_000_000, 40_000_000, 20_000_000, 7_000_000, 2_900_000, 100_000]),
    ("cluster-agent", [25_000_000, 12_000_000, 5_000_000, 2_000_000, 900_000, 100_000]),
    ("operator", [14_000_000, 7_000_000, 3_000_000, 800_000, 150_000, 50_000]),
];

const REPOSITORIES: u64 = 20;
const TAGS: u64 = 25;
/// The layers that all images of a repository of W2 share, and the one that each manifest has for itself, in bytes.
const SHARED: [usize; 3] = [64_000, 32_000, 16_000];
const OWN: usize = 8_000;

/// One of the two workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Three images, two platforms, six layers each, 440 MB in all.
    #[value(name = "W1")]
    W1,
    /// 20 repositories with 25 tags each, two platforms, small layers shared inside a repository.
    #[value(name = "W2")]
    W2,
}

/// A workload that a source holds.
pub(crate) struct Workload {
    pub(crate) kind: Kind,
    /// In the order of repositories.
    pub(crate) tags: Vec<Tagged>,
}

/// A tag and the digest that it has at the source.
pub(crate) struct Tagged {
    pub(crate) repository: String,
    pub(crate) tag: String,
    pub(crate) digest: String,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::W1 => "W1",
            Self::W2 => "W2",
        }
    }

    fn repositories(self) -> Vec<Repository> {
        match self {
            Self::W1 => LARGE.iter().zip(1..).map(|((name, layers), seed)| large(name, layers, seed)).collect(),
            Self::W2 => (1..=REPOSITORIES).map(|number| small(number, &SHARED, OWN)).collect(),
        }
    }

    /// Pushes everything, each blob once.
    pub(crate) async fn fill(self, client: &Client) -> Result<Workload> {
        let pushes = self.repositories().into_iter().map(async |repository: Repository| {
            let mut pushed = HashSet::new();
            let mut tags = Vec::new();
            for make in repository.images {
                let (tag, image) = make();
                for blob in image.blobs.iter().filter(|blob| pushed.insert(blob.digest.clone())) {
                    client.put_blob(&repository.name, blob).await?;
                }
                for manifest in &image.manifests {
                    client.put_manifest(&repository.name, &manifest.digest, manifest).await?;
                }
                client.put_manifest(&repository.name, &tag, &image.root).await?;
                tags.push(Tagged { repository: repository.name.clone(), tag, digest: image.digest().to_owned() });
            }
            anyhow::Ok(tags)
        });
        let tags = stream::iter(pushes).buffered(4).try_concat().await?;
        Ok(Workload { kind: self, tags })
    }
}

impl Workload {
    /// The repositories with their tags, in the order in which they were pushed.
    pub(crate) fn repositories(&self) -> Vec<(&str, Vec<&str>)> {
        let same = self.tags.chunk_by(|a, b| a.repository == b.repository);
        same.map(|tags| (tags[0].repository.as_str(), tags.iter().map(|tagged| tagged.tag.as_str()).collect()))
            .collect()
    }

    /// One line for each tag: the repository, a space, the tag.
    pub(crate) fn list(&self) -> String {
        self.tags.iter().map(|tagged| format!("{} {}\n", tagged.repository, tagged.tag)).collect::<Vec<_>>().concat()
    }
}

/// A repository whose images are made only when they are pushed: all of them together would be large.
struct Repository {
    name: String,
    images: Vec<Box<dyn FnOnce() -> (String, Image)>>,
}

fn large(name: &str, layers: &'static [usize], seed: u64) -> Repository {
    let make = move || ("1.0.0".to_owned(), Image::multi_arch(seed, layers, &PLATFORMS));
    Repository { name: name.to_owned(), images: vec![Box::new(make)] }
}

fn small(number: u64, shared: &[usize], own: usize) -> Repository {
    let shared: Vec<Content> = shared.iter().zip(0..).map(|(size, seed)| layer(number * 1000 + seed, *size)).collect();
    let images = (1..=TAGS).map(|tag| {
        let shared = shared.clone();
        let make = move || {
            let platforms = PLATFORMS.iter().zip(0..).map(|(platform, seed)| {
                let own = layer(number * 1000 + tag * 10 + seed, own);
                (*platform, shared.iter().cloned().chain([own]).collect())
            });
            (format!("1.{tag}.0"), Image::of_layers(&platforms.collect::<Vec<_>>()))
        };
        Box::new(make) as Box<dyn FnOnce() -> (String, Image)>
    });
    Repository { name: format!("service-{number:02}"), images: images.collect() }
}

fn layer(seed: u64, size: usize) -> Content {
    let mut bytes = vec![0; size];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    Content::layer(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w1_is_440_megabytes() {
        let one_platform: usize = LARGE.iter().flat_map(|(_, layers)| layers).sum();
        assert_eq!(one_platform * PLATFORMS.len(), 440_000_000);
    }

    #[test]
    fn w2_has_as_many_tags_manifests_and_blobs_as_it_says() {
        let (mut tags, mut manifests, mut blobs) = (0, HashSet::new(), HashSet::new());
        // Small layers, because hashing takes long in a debug build.
        for repository in (1..=REPOSITORIES).map(|number| small(number, &[300, 200, 100], 50)) {
            for make in repository.images {
                let (_, image) = make();
                tags += 1;
                manifests.extend(image.manifests.iter().chain([&image.root]).map(|manifest| manifest.digest.clone()));
                blobs.extend(image.blobs.iter().map(|blob| blob.digest.clone()));
            }
        }
        assert_eq!((tags, manifests.len(), blobs.len()), (500, 1500, 2060));
    }

    #[test]
    fn tags_are_listed_by_repository() {
        let tagged = |repository: &str, tag: &str| Tagged {
            repository: repository.to_owned(),
            tag: tag.to_owned(),
            digest: String::new(),
        };
        let workload = Workload { kind: Kind::W1, tags: vec![tagged("a", "1"), tagged("a", "2"), tagged("b", "1")] };
        assert_eq!(workload.repositories(), [("a", vec!["1", "2"]), ("b", vec!["1"])]);
        assert_eq!(workload.list(), "a 1\na 2\nb 1\n");
    }
}
