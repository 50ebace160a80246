package repo

import (
	"bytes"
	"slices"
	"testing"

	"holdfast/internal/repo/internal/pack"
)

// Chunks are ordered by their whole ids, also where they begin alike, and each
// is there once.
func TestSortChunks(t *testing.T) {
	rng := rng(t)
	chunks := make([]neededChunk, 5000)
	for i := range chunks {
		fillRandom(rng, chunks[i].id[:])
		if i%3 > 0 {
			clear(chunks[i].id[:rng.IntN(33)])
		}
	}
	order := sortChunks(nil, chunks)
	var got, want []pack.ID
	for i, key := range order {
		got, want = append(got, chunks[key&(1<<chunkBits-1)].id), append(want, chunks[i].id)
	}
	slices.SortFunc(want, func(a, b pack.ID) int { return bytes.Compare(a[:], b[:]) })
	if !slices.Equal(got, want) {
		t.Error("not in order")
	}
}
