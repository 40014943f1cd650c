//! A volume that is served with another size from now on.
//!
//! Does not know how its file got it: that is `volume`'s. Called by `server` between turns, and by tests.

use cirro_protocol::types::VolumeName;

use super::Node;
use crate::store::Store;
use crate::volume::{Told, Unfit};

impl<S: Store> Node<S> {
    /// Requests are held to the new size from now on, and sessions that have the volume open are told (P-120). What is in flight was held to the old one:
    /// a smaller one is refused while anybody could have something in flight, or later.
    pub(super) fn resize(&mut self, name: &VolumeName, capacity_sectors: u64) -> Result<Told, Unfit> {
        let place = self.volumes.iter().position(|served| served.volume.name == *name);
        let volume = place.ok_or(Unfit::NotServed)? as u16;
        let served = &self.volumes[usize::from(volume)];
        let sectors_before = served.volume.capacity_sectors;
        if capacity_sectors < sectors_before {
            self.check_unused(volume)?;
        }
        if capacity_sectors == sectors_before {
            return Ok(Told { sectors_before, sessions: 0 });
        }
        self.volumes[usize::from(volume)].volume.capacity_sectors = capacity_sectors;
        let sessions = self.tell(volume);
        log::info!(
            "volume {name}: has {capacity_sectors} sectors now, not {sectors_before}; {sessions} sessions are told"
        );
        Ok(Told { sectors_before, sessions })
    }

    fn check_unused(&self, volume: u16) -> Result<(), Unfit> {
        let served = &self.volumes[usize::from(volume)];
        let using = |session: &super::session::Session| session.volume == volume && session.opened.is_some();
        let open = self.sessions.iter().filter(|(_, session)| using(session)).count() as u32;
        if open > 0 {
            return Err(Unfit::Open(open));
        }
        if let Some(holder) = served.owner.holder {
            return Err(Unfit::Held(holder));
        }
        if !served.openings.is_empty() || self.jobs.has_older_change(volume, served.next_change) {
            return Err(Unfit::Busy);
        }
        Ok(())
    }

    fn tell(&mut self, volume: u16) -> u32 {
        let mut told = 0;
        for index in self.sessions.indexes() {
            let served = &self.volumes[usize::from(volume)];
            let Some(session) = self.sessions.get(index).filter(|session| session.volume == volume) else {
                continue;
            };
            let Some(opened) = session.opened.filter(|_| !session.closing) else { continue };
            let info = served.volume.info(served.owner.vol_epoch, opened.handle, session.standing.right);
            session.target.notify(info);
            self.sessions.activate(index);
            told += 1;
        }
        told
    }
}
