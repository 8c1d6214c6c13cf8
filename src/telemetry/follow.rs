//! Files that change while the process runs, as mounted `ConfigMap`s and `Secret`s do. They are read again every so
//! often: a watch of a mounted directory, whose files are links that are replaced, would need more and miss more.

use std::{convert::Infallible, io, path::PathBuf, time::Duration};

/// Hands over what is in the files, now and whenever that has changed.
///
/// What cannot be read is said once, and what was handed over before stays.
pub async fn follow<const N: usize>(
    paths: [PathBuf; N],
    every: Duration,
    mut changed: impl FnMut([Vec<u8>; N]),
) -> Infallible {
    let mut last = None;
    let mut is_readable = true;
    loop {
        match read(&paths).await {
            Ok(now) => {
                if last.as_ref() != Some(&now) {
                    last = Some(now.clone());
                    changed(now);
                }
                is_readable = true;
            }
            Err(error) => {
                if std::mem::take(&mut is_readable) {
                    tracing::warn!(?paths, %error, "files cannot be read: what was in them stays in force");
                }
            }
        }
        tokio::time::sleep(every).await;
    }
}

async fn read<const N: usize>(paths: &[PathBuf; N]) -> io::Result<[Vec<u8>; N]> {
    let mut contents = [const { Vec::new() }; N];
    for (content, path) in contents.iter_mut().zip(paths) {
        *content = tokio::fs::read(path).await?;
    }
    Ok(contents)
}
