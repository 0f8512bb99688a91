package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/txbox/txbox/internal/checker"
)

// run is one storm and what came of it.
type run struct {
	options
	site     *site
	tap      *tap
	checker  *checker.Checker
	children []*child
	rng      *rand.Rand
	began    time.Time

	done     map[string]int // faults, by name
	recovery time.Duration  // the longest
	wrong    []checker.Violation
}

const (
	warmUp   = 3 * time.Second
	calmMost = time.Second
	// recoveryLimit is how long after a fault a message may take that was written after it. A
	// server that was killed needs some 15 s of that, a connection in a black hole 20 s.
	recoveryLimit = 60 * time.Second
)

// storm runs all phases, and returns the verdict if there is one.
func storm(ctx context.Context, o options) (v *verdict, err error) {
	r := &run{options: o, rng: rand.New(rand.NewPCG(o.seed, 0)), began: time.Now(), done: make(map[string]int)}
	if err := errors.Join(os.RemoveAll(o.dir+"/logs"), os.MkdirAll(o.dir+"/logs", 0o755)); err != nil {
		return nil, err
	}
	r.say("starting servers")
	if r.site, err = openSite(ctx, o.dir, o.seed); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.site.close()) }()
	if r.checker, err = checker.New(ctx, r.site.check, queue, otherQueue); err != nil {
		return nil, err
	}
	r.tap = &tap{site: r.site, checker: r.checker}
	tapCtx, stopTap := context.WithCancel(ctx)
	defer stopTap()
	tapped := make(chan struct{})
	go func() { defer close(tapped); r.tap.run(tapCtx) }()
	defer r.killAll()
	if err := r.startAll(); err != nil {
		return nil, err
	}
	if err := r.phases(ctx); err != nil {
		return nil, err
	}
	stopTap()
	<-tapped
	if r.tap.err != nil {
		return nil, fmt.Errorf("tap: %w", r.tap.err)
	}
	return r.judge(ctx)
}

// phases are warm-up, storm, heal, quiesce and drain.
func (r *run) phases(ctx context.Context) error {
	if err := r.awaitFlow(ctx); err != nil {
		return fmt.Errorf("warm-up: %w", err)
	}
	time.Sleep(warmUp)
	before := r.levels(ctx)
	for storm := time.Now(); ctx.Err() == nil && time.Since(storm) < r.duration; {
		if err := r.harm(ctx); err != nil {
			return err
		}
		time.Sleep(rand.N(calmMost))
	}
	r.say("the storm is over; draining")
	if err := r.stop("producer"); err != nil {
		r.violate("I7", err.Error())
	}
	if err := r.drain(ctx); err != nil {
		r.violate("I7", err.Error())
	}
	r.compare(before, r.levels(ctx))
	for _, role := range []string{"consumer", "relay"} {
		if err := r.stop(role); err != nil {
			r.violate("I7", err.Error())
		}
	}
	r.left(ctx)
	return context.Cause(ctx)
}

// harm does one to three faults at once, ends them, and waits until messages flow again.
func (r *run) harm(ctx context.Context) error {
	targets := make(map[string]bool)
	var heals []func() error
	var names []string
	for range 1 + r.rng.IntN(3) {
		f := r.faults[r.rng.IntN(len(r.faults))]
		if targets[f.target] {
			continue
		}
		targets[f.target] = true
		heal, err := f.do(ctx, r, r.rng)
		if err != nil {
			return fmt.Errorf("%s of %s: %w", f.name, f.target, err)
		}
		r.done[f.name]++
		heals, names = append(heals, heal), append(names, f.name+" "+f.target)
	}
	time.Sleep(time.Duration(r.rng.Int64N(int64(r.hold))))
	var healing errgroup.Group
	for _, heal := range heals {
		healing.Go(heal)
	}
	if err := healing.Wait(); err != nil {
		return fmt.Errorf("heal %s: %w", strings.Join(names, ", "), err)
	}
	healed := time.Now()
	if err := r.awaitFlow(ctx); err != nil {
		r.violate("I8", fmt.Sprintf("after %s: %s", strings.Join(names, ", "), err))
	}
	took := time.Since(healed)
	r.recovery = max(r.recovery, took)
	r.say("%s; recovered in %.1f s", strings.Join(names, ", "), took.Seconds())
	for _, c := range r.children {
		if err := c.died(); err != nil {
			r.violate("I7", err.Error())
			if err := c.start(); err != nil {
				return err
			}
		}
	}
	return context.Cause(ctx)
}

// awaitFlow waits until a message has taken effect that was written from now on.
func (r *run) awaitFlow(ctx context.Context) error {
	now := time.Now() // the producers' clock, too
	return await(ctx, recoveryLimit, "a message that was written since takes effect", func(ctx context.Context) bool {
		var flows bool
		err := r.site.till.QueryRow(ctx, "SELECT count(DISTINCT consumer) = 2 FROM applied WHERE at > $1", now).Scan(&flows)
		return err == nil && flows
	})
}

// drain waits until everything has taken effect or is parked as poison, for as long as there
// is progress.
func (r *run) drain(ctx context.Context) error {
	var before, now progress
	began := time.Now()
	for {
		err := await(ctx, r.drainLimit, "any progress", func(ctx context.Context) bool {
			shop := r.site.shop.QueryRow(ctx, `SELECT (SELECT count(*) FROM committed), (SELECT count(*) FROM txbox.outbox) + (SELECT count(*) FROM txbox.outbox_parked)`)
			till := r.site.till.QueryRow(ctx, `SELECT (SELECT count(*) FROM applied), count(*) FILTER (WHERE reason = 'dead'), count(*) FILTER (WHERE reason <> 'dead') FROM txbox.inbox_parked`)
			err := errors.Join(shop.Scan(&now.committed, &now.waiting), till.Scan(&now.applied, &now.dead, &now.retry))
			return err == nil && (now != before || now.settled())
		})
		if err != nil {
			return fmt.Errorf("%w: of %d committed, %d wait in the outbox, %d are applied, %d dead, %d wait in the inbox",
				err, now.committed, now.waiting, now.applied, now.dead, now.retry)
		}
		if now.settled() && r.tap.quiet() > 5*tapDelay {
			r.say("drained in %.1f s", time.Since(began).Seconds())
			return nil
		}
		before = now
	}
}

// progress is how far messages are.
type progress struct{ committed, waiting, applied, dead, retry int64 }

func (p progress) settled() bool {
	return p.waiting == 0 && p.retry == 0 && p.applied+p.dead >= 2*p.committed
}

func (r *run) startAll() error {
	for _, c := range []struct {
		name, database, db, broker string
		args                       []string
	}{
		{"relay-1", shopDatabase, relayDB, relayBroker, nil},
		{"relay-2", shopDatabase, relayDB, relayBroker, nil},
		{"consumer-1", tillDatabase, consumerDB, consumerBroker, []string{"-batch=1"}},
		{"consumer-2", tillDatabase, consumerDB, consumerBroker, []string{"-batch=20"}},
		{"consumer-3", tillDatabase, consumerDB, consumerBroker, []string{"-batch=50", "-queue=" + otherQueue}},
		{"producer-1", shopDatabase, producerDB, "", nil},
		{"producer-2", shopDatabase, producerDB, "", []string{"-async"}},
	} {
		role, number, _ := strings.Cut(c.name, "-")
		child := &child{name: c.name, log: r.logFile(c.name), env: r.site.environment(c.database, c.db, c.broker), args: append([]string{
			role, "-name=" + c.name, fmt.Sprintf("-seed=%d%s", r.seed, number), fmt.Sprint("-rate=", max(r.rate/2, 1)),
			"-canary=" + r.site.canary, "-outcomes=" + r.outcomeFile(c.name),
		}, c.args...)}
		r.children = append(r.children, child)
		if err := child.start(); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) logFile(name string) string     { return filepath.Join(r.dir, "logs", name+".log") }
func (r *run) outcomeFile(name string) string { return filepath.Join(r.dir, "logs", name+".outcomes") }

func (r *run) child(name string) *child {
	return r.children[slices.IndexFunc(r.children, func(c *child) bool { return c.name == name })]
}

// stop stops all children of a role cleanly.
func (r *run) stop(role string) error {
	var stopping errgroup.Group
	for _, c := range r.children {
		if strings.HasPrefix(c.name, role) {
			stopping.Go(c.stop)
		}
	}
	return stopping.Wait()
}

func (r *run) killAll() {
	for _, c := range r.children {
		c.kill()
	}
}

func (r *run) violate(invariant, what string) {
	r.say("%s: %s", invariant, what)
	r.wrong = append(r.wrong, checker.Violation{Invariant: invariant, What: what, Count: 1})
}

func (r *run) say(format string, args ...any) {
	fmt.Printf("%6.1f s  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

// faultsDone returns how many faults were done.
func (r *run) faultsDone() (n int) {
	for times := range maps.Values(r.done) {
		n += times
	}
	return n
}

// pollEvery is how often await asks.
const pollEvery = 50 * time.Millisecond

// await polls until done reports true.
func await(ctx context.Context, limit time.Duration, what string, done func(context.Context) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %s: %s", limit, what))
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		once, cancelOnce := context.WithTimeout(ctx, 5*time.Second)
		ok := done(once)
		cancelOnce()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
