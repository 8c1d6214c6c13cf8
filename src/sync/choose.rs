//! Which images a run is about, where rules choose the tags: lists are read, tags chosen, and two images that want one
//! target tag are told apart.

use std::collections::{BTreeMap, HashMap};

use futures::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{Failure, ImageRequest, ImageSource, Last, Registries, SyncRequest, Unknown, handles::open_source};
use crate::{
    copy::CopyError,
    oci::{Host, PlatformFilter, RepositoryName, Tag},
    plan::MAX_IMAGES,
    reason::Reason,
    registry::{Client, MAX_PAGES, TagList},
    select::Selection,
};

/// Lists that are read side by side.
const LISTS_AT_ONCE: usize = 16;

/// A repository whose tags are chosen by rule.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SelectionRequest {
    /// The registry.
    pub host: Host,
    /// The repository.
    pub repository: RepositoryName,
    /// Which tags.
    pub select: Selection,
    /// The repository at the target.
    pub target_repository: RepositoryName,
    /// The platforms that are kept; none named is all.
    pub platforms: Vec<PlatformFilter>,
    /// How tags of the target's repository were after the last run, as far as that is known.
    pub last: BTreeMap<Tag, Last>,
    /// Why its images fail without a request, such as a missing Secret.
    pub blocked: Option<Failure>,
}

/// Reads the lists of tags and adds the images that are chosen to those of the request. `None` if `cancel` came first.
///
/// A list that cannot be read is an [`Unknown`] of the request. An image whose target tag another one of the request
/// wants too, with another content, is blocked. Of too many images none is left.
pub async fn choose(
    client: &Client,
    mut request: SyncRequest,
    selections: &[SelectionRequest],
    registries: &Registries,
    cancel: &CancellationToken,
) -> Option<SyncRequest> {
    if selections.is_empty() {
        return Some(request);
    }
    let deadline = Instant::now() + request.timeout;
    let lists = read_lists(client, selections, registries, deadline);
    let lists = cancel.run_until_cancelled(lists).await?;
    let mut taken: HashMap<(RepositoryName, Tag), ImageRequest> = HashMap::new();
    for image in &request.images {
        taken.insert((image.target_repository.clone(), image.target_tag.clone()), image.clone());
    }
    let mut left_out = 0;
    for (selection, chosen) in selections.iter().zip(lists) {
        match chosen {
            Ok(chosen) => {
                left_out += chosen.count - chosen.tags.len();
                let images = chosen.tags.iter().map(|tag| selection.image(tag));
                request.images.extend(images.filter_map(|image| place(&mut taken, image)));
            }
            Err(failure) => request.unknown.push(selection.unknown(registries, failure)),
        }
    }
    if let Some(message) = request.policy.too_many(request.images.len() + left_out) {
        let failure = Failure::new(Reason::InvalidSpec, &message);
        request.images.clear();
        request.unknown = selections.iter().map(|each| each.unknown(registries, failure.clone())).collect();
    }
    Some(request)
}

/// What a rule has chosen.
struct Chosen {
    /// Not more than a mirror may have.
    tags: Vec<Tag>,
    /// How many there are in all.
    count: usize,
}

/// What each rule chooses, in their order. Each list is read once and kept only until all rules about it have chosen.
async fn read_lists(
    client: &Client,
    selections: &[SelectionRequest],
    registries: &Registries,
    deadline: Instant,
) -> Vec<Result<Chosen, Failure>> {
    let blocked = selections.iter().map(|selection| selection.blocked.clone().map(Err));
    let mut chosen: Vec<Option<Result<Chosen, Failure>>> = blocked.collect();
    let mut places: BTreeMap<(Host, RepositoryName), Vec<usize>> = BTreeMap::new();
    for (at, selection) in selections.iter().enumerate().filter(|(_, selection)| selection.blocked.is_none()) {
        places.entry((selection.host.clone(), selection.repository.clone())).or_default().push(at);
    }
    let choices = places.into_iter().map(async |(place, rules)| {
        let list = timeout_at(deadline, read_list(client, &place, registries)).await;
        let too_long = || Err(Failure::new(Reason::Timeout, "reading the list of tags took longer than spec.timeout"));
        let list = list.unwrap_or_else(|_| too_long());
        let choose =
            |at: usize| (at, list.as_ref().map(|list| chosen_of(&selections[at].select, list)).map_err(Clone::clone));
        rules.into_iter().map(choose).collect::<Vec<_>>()
    });
    let mut choices = stream::iter(choices).buffer_unordered(LISTS_AT_ONCE);
    while let Some(done) = choices.next().await {
        for (at, choice) in done {
            chosen[at] = Some(choice);
        }
    }
    chosen.into_iter().flatten().collect()
}

fn chosen_of(rule: &Selection, list: &TagList) -> Chosen {
    let wanted = rule.choose(&list.tags);
    let count = wanted.len();
    Chosen { tags: wanted.into_iter().take(MAX_IMAGES + 1).cloned().collect(), count }
}

async fn read_list(
    client: &Client,
    (host, repository): &(Host, RepositoryName),
    registries: &Registries,
) -> Result<TagList, Failure> {
    let fail = |error: CopyError| Failure::new(error.reason(), &error.message());
    let source = open_source(client, registries, host, repository)
        .ok_or_else(|| Failure::new(Reason::InternalError, "the source registry was not prepared for this run"))?
        .map_err(|error| fail(CopyError::source(error)))?;
    let list = source.tags(MAX_PAGES).await.map_err(|error| fail(CopyError::source(error)))?;
    if !list.is_complete {
        let what = format!("the list of tags of {} has more than {MAX_PAGES} pages", source.place());
        return Err(Failure::new(Reason::SourceUnavailable, &what));
    }
    Ok(list)
}

/// The image if nobody has its target tag; blocked if somebody has who wants another content there, and nothing if it
/// is the same.
fn place(taken: &mut HashMap<(RepositoryName, Tag), ImageRequest>, mut image: ImageRequest) -> Option<ImageRequest> {
    let key = (image.target_repository.clone(), image.target_tag.clone());
    let Some(other) = taken.get(&key) else {
        taken.insert(key, image.clone());
        return Some(image);
    };
    if (&other.source, &other.platforms) == (&image.source, &image.platforms) {
        return None;
    }
    let message = format!(
        "{}/{} wants the target tag {}:{} too, and is first in spec.images; give one of them another targetRepository",
        other.source.host, other.source.repository, key.0, key.1
    );
    image.blocked = Some(Failure::new(Reason::Conflict, &message));
    Some(image)
}

impl SelectionRequest {
    fn image(&self, tag: &Tag) -> ImageRequest {
        ImageRequest {
            source: ImageSource {
                host: self.host.clone(),
                repository: self.repository.clone(),
                tag: Some(tag.clone()),
                digest: None,
            },
            target_repository: self.target_repository.clone(),
            target_tag: tag.clone(),
            platforms: self.platforms.clone(),
            last: self.last.get(tag).cloned(),
            is_contested: false,
            blocked: None,
        }
    }

    /// `host/repository` at the target.
    #[must_use]
    pub fn target_of(&self, registries: &Registries) -> String {
        let source = (&self.host, &self.repository);
        let (host, repository) = registries.target.repository_of(source, &self.target_repository);
        format!("{host}/{repository}")
    }

    fn unknown(&self, registries: &Registries, failure: Failure) -> Unknown {
        let source = format!("{}/{}", self.host, self.repository);
        Unknown { source, target: self.target_of(registries), failure }
    }
}
