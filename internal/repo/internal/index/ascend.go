package index

import (
	"bytes"

	"holdfast/internal/repo/internal/pack"
)

// LookupAll looks ascending ids up, and calls found for each with everywhere
// that it lies; places is valid during the call. found must not use the index.
// For many ids at once it is several times faster than Lookup, as every page is
// read once and in order, and needs little memory: pages are given back.
func (x *Index) LookupAll(ids func(yield func(pack.ID) bool), found func(places []Place) error) (err error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	walkers := make([]*walker, len(x.segments))
	for i, s := range x.segments {
		walkers[i] = &walker{s: s, page: -1, loaded: -1}
		defer walkers[i].release()
	}
	var places []Place
	for id := range ids {
		places = places[:0]
		for _, w := range walkers {
			if places, err = w.lookup(id, places); err != nil {
				return err
			}
		}
		if err := found(places); err != nil {
			return err
		}
	}
	return nil
}

// walker looks ascending ids up in a segment.
type walker struct {
	s        *segment
	page     int64 // the last one whose first id is below the ids to come, or 0; -1 before the first
	loaded   int64 // the page whose items are in items; -1 for none
	released int64
	items    []byte
}

func (w *walker) lookup(id pack.ID, places []Place) ([]Place, error) {
	s := w.s
	if s.pages == 0 {
		return places, nil
	}
	if w.page < 0 {
		w.page = s.first(id)
		w.released = w.page
	}
	for w.page+1 < s.pages && bytes.Compare(s.firstID(w.page+1), id[:]) < 0 {
		w.page++
	}
	if w.page-w.released >= releasePages {
		w.release()
	}
	if w.page+1 < s.pages && bytes.Equal(s.firstID(w.page+1), id[:]) {
		return s.lookup(id, places) // it may go on over several pages
	}
	if w.loaded != w.page {
		var err error
		if w.items, err = s.page(w.page); err != nil {
			return places, err
		}
		w.loaded = w.page
	}
	return s.inPage(w.page, w.items, id, places)
}

// release gives the pages before the one in use back.
func (w *walker) release() {
	if w.page < 0 {
		return
	}
	release(w.s.data[(w.released+1)*pageLen : (w.page+1)*pageLen])
	w.released = w.page
}
