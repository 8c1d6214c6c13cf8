//! The proof that what arrived is what was there: crane, an independent client, asks both registries for every digest.
//! They must be equal, and be those of the images that were pushed.

use anyhow::{Context, Result, ensure};

use super::images::Tagged;
use crate::commands::Commands;
use crate::images::Image;
use crate::terminal;

/// The registries as crane reaches them.
pub(super) struct Sides<'a> {
    pub(super) commands: &'a Commands,
    pub(super) source: &'a str,
    pub(super) target: &'a str,
}

impl Sides<'_> {
    /// Compares the index and each platform of the image, and prints a row for each.
    pub(super) async fn compare(&self, tagged: &Tagged) -> Result<()> {
        for (what, pushed) in tagged.digests() {
            let source = self.digest(what, self.source, &tagged.at_source()).await?;
            let target = self.digest(what, self.target, &tagged.at_target()).await?;
            ensure!(source == pushed, "{} ({what}): the source has {source}, {pushed} was pushed", tagged.at_source());
            ensure!(target == source, "{} ({what}): the target has {target}, the source {source}", tagged.at_target());
            let (source, target) = (terminal::short(&source), terminal::short(&target));
            terminal::output(&format!("{:<21} {what:<12} {source}  {target}  equal", tagged.short_name()));
        }
        Ok(())
    }

    /// Has crane pull all platforms from the target, and compares every byte with what was pushed to the source.
    pub(super) async fn pull(&self, tagged: &Tagged) -> Result<()> {
        let to = format!("pulled-{}", tagged.name);
        self.commands.show(&format!("crane pull --format oci {}/{} {to}", self.target, tagged.at_target())).await?;
        let blobs = self.commands.dir.join(to).join("blobs");
        let Image { root, manifests, blobs: layers } = &tagged.image;
        for content in layers.iter().chain(manifests).chain([root]) {
            let path = blobs.join(content.digest.replace(':', "/"));
            let bytes = tokio::fs::read(&path).await.with_context(|| format!("crane pulled no {}", content.digest))?;
            ensure!(bytes == content.bytes, "{} arrived with other bytes", content.digest);
        }
        Ok(())
    }

    async fn digest(&self, what: &str, host: &str, reference: &str) -> Result<String> {
        self.commands.quiet(&digest_command(what, host, reference)).await
    }

    /// Prints the head of the table and the kind of command behind it.
    pub(super) fn begin(&self, tagged: &Tagged) {
        let (what, _) = tagged.digests()[1];
        self.commands.announce(&format!("{}   # and so on", digest_command(what, self.source, &tagged.at_source())));
        terminal::output(&format!("{:<34} {:<19}  TARGET", "IMAGE", "SOURCE"));
    }
}

fn digest_command(what: &str, host: &str, reference: &str) -> String {
    if what == "index" {
        format!("crane digest {host}/{reference}")
    } else {
        format!("crane digest --platform {what} {host}/{reference}")
    }
}
