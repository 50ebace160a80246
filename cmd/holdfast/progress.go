package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"holdfast/internal/mover"
)

const (
	barsEvery  = 250 * time.Millisecond
	linesEvery = 5 * time.Second
)

// progress shows work under way on stderr: bars on a terminal, else a line
// every few seconds. Its methods may run in parallel.
type progress struct {
	w     io.Writer
	quiet bool
	bars  bool // w is a terminal

	mu    sync.Mutex // guards what follows, and writing to w
	tasks []*showing
	mpb   *mpb.Progress // nil when no bar is on the screen
	stop  chan struct{} // closed to end the loop; nil when none runs
	over  sync.WaitGroup
}

// showing is a piece of work on the display.
type showing struct {
	name  string
	meter *mover.Meter
	bar   *mpb.Bar // nil for lines

	mu sync.Mutex // guards p
	p  mover.Progress
}

func newProgress(w io.Writer, quiet bool) *progress {
	p := &progress{w: w, quiet: quiet}
	if f, ok := w.(*os.File); ok && os.Getenv("TERM") != "dumb" {
		p.bars = term.IsTerminal(int(f.Fd()))
	}
	return p
}

// task puts work on the display until end is called.
func (p *progress) task(name string, m *mover.Meter) (end func()) {
	if p.quiet {
		return func() {}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &showing{name: name, meter: m}
	s.sample()
	if p.bars {
		if p.mpb == nil {
			p.mpb = mpb.New(mpb.WithOutput(p.w), mpb.WithRefreshRate(barsEvery))
		}
		s.bar = p.mpb.New(0, mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]"),
			mpb.BarWidth(32),
			mpb.PrependDecorators(decor.Name(name, decor.WC{C: decor.DindentRight | decor.DSyncWidth | decor.DextraSpace})),
			mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return " " + s.line() })))
	}
	p.tasks = append(p.tasks, s)
	p.loop()
	return sync.OnceFunc(func() { p.end(s) })
}

// loop starts what refreshes the display. The caller holds mu.
func (p *progress) loop() {
	if p.stop != nil {
		return
	}
	stop, every := make(chan struct{}), linesEvery
	if p.bars {
		every = barsEvery
	}
	p.stop = stop
	p.over.Go(func() {
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-stop:
				return
			case <-t.C:
				p.refresh()
			}
		}
	})
}

func (p *progress) refresh() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.tasks {
		s.sample()
		if s.bar != nil {
			s.bar.SetTotal(s.p.Total, false)
			s.bar.SetCurrent(s.p.Done)
		} else {
			fmt.Fprintf(p.w, "%s: %s\n", s.name, s.line())
		}
	}
}

func (p *progress) end(s *showing) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.tasks, s)
	if i < 0 {
		return // the display was closed
	}
	p.tasks = slices.Delete(p.tasks, i, i+1)
	if s.bar != nil {
		s.bar.Abort(true)
	}
}

// note writes a line, above the bars if there are any.
func (p *progress) note(line string) {
	if p.quiet {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mpb != nil {
		if _, err := p.mpb.Write([]byte(line + "\n")); err == nil {
			return
		}
	}
	fmt.Fprintln(p.w, line)
}

// close takes everything off the display. It may be used again afterwards.
func (p *progress) close() {
	p.mu.Lock()
	if p.stop != nil {
		close(p.stop)
		p.stop = nil
	}
	for _, s := range p.tasks {
		if s.bar != nil {
			s.bar.Abort(true)
		}
	}
	p.tasks = nil
	bars := p.mpb
	p.mpb = nil
	p.mu.Unlock()
	p.over.Wait()
	if bars != nil {
		bars.Wait() // all bars are aborted
	}
}

// sample reads the meter.
func (s *showing) sample() {
	now := s.meter.Progress()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.p = now
}

// line is how far the work is: share, bytes, rate, time left.
func (s *showing) line() string {
	s.mu.Lock()
	p := s.p
	s.mu.Unlock()
	if p.Total <= 0 && p.Done <= 0 {
		return "starting"
	}
	text := size(p.Done)
	if p.Total > 0 {
		text = fmt.Sprintf("%3d%%  %s of %s", min(p.Done*100/p.Total, 100), size(p.Done), size(p.Total))
	}
	if p.Rate > 0 {
		text += fmt.Sprintf("  %s/s", size(int64(p.Rate)))
	}
	if p.Left > 0 {
		text += fmt.Sprintf("  %s left", took(max(p.Left.Round(time.Second), time.Second)))
	}
	return text
}
