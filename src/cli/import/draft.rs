//! `ImageMirror`s in the making: images with the same settings come together, and only what is valid is kept.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use crate::{
    api::v1alpha1::{Image, ImageMirror, ImageMirrorSpec, Registry, SecretReference},
    mirror::validate,
};

/// As many as the schema allows.
const MAX_IMAGES: usize = 500;
/// Leaves room for a number within the 52 that a name may have.
const MAX_NAME: usize = 46;

/// All objects that come of a file.
#[derive(Default)]
pub(super) struct Drafts {
    objects: Vec<Draft>,
    /// What is about no object.
    notes: Vec<String>,
    /// Who wants which target tag.
    wanted: HashMap<String, String>,
    names: BTreeMap<(String, String), usize>,
}

struct Draft {
    base: Base,
    number: usize,
    images: Vec<Image>,
    hosts: BTreeSet<String>,
    notes: Vec<String>,
}

/// What the images of an object have in common.
#[derive(Clone, PartialEq)]
pub(super) struct Base {
    pub(super) name: String,
    pub(super) namespace: Option<String>,
    /// Without images.
    pub(super) spec: ImageMirrorSpec,
}

/// What is known of a registry.
#[derive(Clone, Default)]
pub(super) struct Host {
    pub(super) settings: Option<Registry>,
    /// The Secret with its login.
    pub(super) secret: Option<String>,
    pub(super) notes: Vec<String>,
}

impl Drafts {
    pub(super) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    pub(super) fn are_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Adds an image, if it is valid and nobody else wants its target. `at` says where it stands in the file.
    pub(super) fn add(&mut self, base: Base, at: &str, image: Image, mut notes: Vec<String>) {
        let alone = ImageMirrorSpec { images: vec![image.clone()], ..base.spec.clone() };
        let validated = match validate(&ImageMirror::new("valid", alone)) {
            Ok(validated) => validated,
            Err(error) => {
                let error = error.to_string().replace("spec.images[0].", "");
                return self.note(format!("{at} is left out: {}", OneLine(&error)));
            }
        };
        for target in validated.images.iter().map(|image| validated.target_of(image)) {
            if let Some(other) = self.wanted.get(&target) {
                return self.note(format!("{at} is left out: {other} writes {target} too"));
            }
        }
        let targets = validated.images.iter().map(|image| (validated.target_of(image), at.to_owned()));
        self.wanted.extend(targets);
        let hosts = validated.source_hosts().chain([&validated.target_host]).map(ToString::to_string).collect();
        let draft = self.objects.iter_mut().find(|draft| draft.base == base && draft.images.len() < MAX_IMAGES);
        match draft {
            Some(draft) => {
                draft.images.push(image);
                draft.hosts.extend(hosts);
                notes.retain(|note| !draft.notes.contains(note));
                draft.notes.extend(notes);
            }
            None => {
                let key = (base.namespace.clone().unwrap_or_default(), base.name.clone());
                let number = self.names.entry(key).or_default();
                *number += 1;
                self.objects.push(Draft { base, number: *number, images: vec![image], hosts, notes });
            }
        }
    }

    /// Adds what is known of the registries to the objects that have to do with them.
    pub(super) fn with_hosts(mut self, hosts: &BTreeMap<String, Host>) -> Self {
        for draft in &mut self.objects {
            for (name, host) in hosts.iter().filter(|(name, _)| draft.hosts.contains(*name)) {
                let spec = &mut draft.base.spec;
                spec.registries.extend(host.settings.clone());
                if let Some(secret) = &host.secret {
                    let secret = SecretReference { name: secret.clone() };
                    if *name == spec.target.registry {
                        spec.target.secret_ref = Some(secret.clone());
                    }
                    let is_source = draft.images.iter().any(|image| is_at(&image.source, name));
                    if is_source && !spec.image_pull_secrets.contains(&secret) {
                        spec.image_pull_secrets.push(secret);
                    }
                }
                draft.notes.extend(host.notes.iter().cloned());
            }
        }
        self
    }

    fn mirrors(&self) -> impl Iterator<Item = (ImageMirror, &[String])> {
        self.objects.iter().map(|draft| {
            let spec = ImageMirrorSpec { images: draft.images.clone(), ..draft.base.spec.clone() };
            let name: String = draft.base.name.chars().take(MAX_NAME).collect();
            let name = if draft.number == 1 { name } else { format!("{name}-{}", draft.number) };
            let mut mirror = ImageMirror::new(&name, spec);
            mirror.metadata.namespace.clone_from(&draft.base.namespace);
            (mirror, draft.notes.as_slice())
        })
    }
}

fn is_at(source: &str, host: &str) -> bool {
    source.parse::<crate::oci::Reference>().is_ok_and(|source| source.host.as_str() == host)
}

impl fmt::Display for Drafts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for note in &self.notes {
            writeln!(f, "# {}", OneLine(note))?;
        }
        for (number, (mirror, notes)) in self.mirrors().enumerate() {
            if number > 0 || !self.notes.is_empty() {
                writeln!(f, "---")?;
            }
            for note in notes {
                writeln!(f, "# {}", OneLine(note))?;
            }
            f.write_str(&serde_saphyr::to_string(&mirror).map_err(|_| fmt::Error)?)?;
        }
        Ok(())
    }
}

/// Text of others in one line of a comment, which it cannot leave.
pub(super) struct OneLine<'a>(pub(super) &'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // YAML ends a line at these two, too.
        let is_break = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
        self.0.chars().take(400).try_for_each(|c| write!(f, "{}", if is_break(c) { ' ' } else { c }))
    }
}

/// A name for a Secret that is about a host.
pub(super) fn secret_name(host: &str, what: &str) -> String {
    let clean = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let host: String = host.chars().map(clean).collect();
    format!("{}-{what}", host.trim_matches('-'))
}
