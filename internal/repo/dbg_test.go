package repo

import (
	"fmt"
	"holdfast/internal/repo/internal/tree"
)

func (r *Repo) explain(id PointID) string {
	s := r.current()
	out := fmt.Sprintf("head %d moved %d\n", s.head, s.moved)
	p, live := s.points[id]
	if !live {
		p = s.forgotten[id]
	}
	out += fmt.Sprintf("live %v session %s\n", live, p.Session)
	inv := packNames(r)
	for _, m := range p.maps() {
		root, _ := tree.ParseRoot(string(m.root), m.size)
		ids := []tree.ID{root.ID}
		if n, err := r.node(ctx, root.ID, root.Levels-1); err == nil {
			for _, c := range n.Children {
				if c != (tree.ID{}) {
					ids = append(ids, c)
				}
			}
		} else {
			out += err.Error() + "\n"
		}
		for _, id := range ids {
			all, _ := r.index.Lookup(id, nil)
			out += fmt.Sprintf("%s %x:", m.what, id[:4])
			for _, pl := range all {
				_, err := r.store.Get(ctx, packName(pl.Pack), 0, 1)
				out += fmt.Sprintf(" [%x q%d inv %v there %v bad %v]", pl.Pack[:4], s.quarantine[pl.Pack], inv[pl.Pack], err == nil, s.bad[badKey{pl.Pack, id}])
			}
			out += "\n"
		}
	}
	for n := uint64(1); n <= s.head; n++ {
		b, err := r.store.Get(ctx, entryName(n), 0, -1)
		if err != nil {
			continue
		}
		t := newState([32]byte{})
		t.head = n - 1
		t.unknown = true
		if err := r.apply(t, b); err != nil {
			out += err.Error()
		}
		out += fmt.Sprintf("%d: points %d forgotten? over %v quarantine %d adds %d", n, len(t.points), len(t.over), len(t.quarantine), len(t.indexes))
		for pid := range t.points {
			out += " " + string(pid)[:8]
		}
		for k := range t.quarantine {
			out += fmt.Sprintf(" q%x", k[:4])
		}
		for k, a := range t.added {
			out += fmt.Sprintf(" add %x lease %.6s", k[:4], a.lease)
			if ps, err := r.readIndex(ctx, k); err == nil {
				for _, p := range ps {
					out += fmt.Sprintf(" p%x", p.Name[:4])
				}
			}
		}
		out += "\n"
	}
	return out
}
