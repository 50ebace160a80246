package s3test

import (
	"encoding/pem"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"
)

// Faults says how a server misbehaves.
type Faults struct {
	// Seed of what happens; 0 takes one by chance. It is printed when the test
	// fails. Requests that run in parallel meet it in any order.
	Seed uint64
	// Chance that a request goes wrong, 0 to 1.
	Chance float64
	// Delay is the longest that a request is held up.
	Delay time.Duration
	// Skew is the chance, of requests that go wrong, of meeting a server with a
	// wrong clock: such errors are tried again only a few times.
	Skew float64
}

// ways in which a request goes wrong. The server does not know which of them
// are tried again by whom.
const (
	refusedBusy   = iota // 503 SlowDown, nothing is done
	refusedError         // 500 InternalError, nothing is done
	cutBefore            // the connection breaks, nothing is done
	lostError            // it is done, the answer is 500
	lostCut              // it is done, the connection breaks
	lostTimeout          // it is done, a gateway answers 504 in HTML
	twice                // it is done twice, the second answer is given
	truncated            // the body of the answer breaks off
	strangersPage        // 200 with somebody's page
	strangers404         // 404 with somebody's page
	ways
)

type injector struct {
	f Faults

	mu   sync.Mutex
	rand *rand.Rand // guarded by mu
}

func newInjector(t testing.TB, f Faults) *injector {
	if f.Seed == 0 {
		f.Seed = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the server misbehaved by seed %d", f.Seed)
		}
	})
	return &injector{f: f, rand: rand.New(rand.NewPCG(f.Seed, 0))}
}

// next says what happens to a request: -1 for nothing wrong.
func (i *injector) next() (way int, skewed bool, delay time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.f.Delay > 0 {
		delay = time.Duration(i.rand.Int64N(int64(i.f.Delay)))
	}
	if i.rand.Float64() >= i.f.Chance {
		return -1, false, delay
	}
	return i.rand.IntN(ways), i.rand.Float64() < i.f.Skew, delay
}

const strangersHTML = "<html><head><title>Sign in</title></head><body/></html>"

func (i *injector) serve(w http.ResponseWriter, r *http.Request, kind string, do func() answer) {
	way, skewed, delay := i.next()
	time.Sleep(delay)
	html := http.Header{"Content-Type": {"text/html"}}
	switch {
	case skewed:
		write(w, r, fail(403, "RequestTimeTooSkewed", "The difference between the request time and the server's time is too large."))
	case way == refusedBusy:
		write(w, r, fail(503, "SlowDown", "Please reduce your request rate."))
	case way == refusedError:
		write(w, r, fail(500, "InternalError", "We encountered an internal error. Please try again."))
	case way == cutBefore:
		cut(w, nil)
	case way == lostError:
		do()
		write(w, r, fail(500, "InternalError", "We encountered an internal error. Please try again."))
	case way == lostCut:
		do()
		cut(w, nil)
	case way == lostTimeout:
		do()
		write(w, r, answer{504, html, []byte(strangersHTML)})
	case way == twice:
		do()
		write(w, r, do())
	case way == truncated:
		a := do()
		cut(w, &a)
	case way == strangersPage && kind == "LIST":
		write(w, r, answer{200, html, []byte(strangersHTML)})
	case way == strangers404:
		write(w, r, answer{404, html, []byte(strangersHTML)})
	default:
		write(w, r, do())
	}
}

// cut breaks the connection: before the answer, or in the middle of its body.
func cut(w http.ResponseWriter, a *answer) {
	if a != nil {
		for k, v := range a.header {
			w.Header()[k] = v
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
		w.WriteHeader(a.status)
		w.Write(a.body[:len(a.body)/2]) // the client may have gone
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
	}
	panic(http.ErrAbortHandler)
}

func pemOf(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
