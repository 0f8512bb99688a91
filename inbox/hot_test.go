package inbox_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// hotRows are a few rows of which each message updates one: a hundred of them from the first
// row to the last, the next hundred back, so that two transactions of many messages deadlock.
type hotRows struct {
	*env
	updates atomic.Int64 // also those that were rolled back
	inVain  atomic.Int64 // of the naive variant
	of      []int        // each message's row
}

const hot, hotMessages = 100, 3000

func newHotRows(t *testing.T, e *env) *hotRows {
	e.exec(t, "CREATE TABLE "+e.Table("hot")+" (id integer PRIMARY KEY, n integer NOT NULL)")
	e.exec(t, "INSERT INTO "+e.Table("hot")+" SELECT g, 0 FROM generate_series(0, $1::int - 1) AS g", hot)
	h := &hotRows{env: e, of: make([]int, hotMessages)}
	for i := range h.of {
		h.of[i] = i % hot
		if i/hot%2 == 1 {
			h.of[i] = hot - 1 - i%hot
		}
	}
	return h
}

func (h *hotRows) update(ctx context.Context, tx pgx.Tx, messageID string) error {
	h.updates.Add(1)
	i, err := strconv.Atoi(messageID)
	if err == nil {
		_, err = tx.Exec(ctx, "UPDATE "+h.Table("hot")+" SET n = n + 1 WHERE id = $1", h.of[i])
	}
	return err
}

func (h *hotRows) want(t *testing.T, n int) {
	t.Helper()
	var sum int
	if err := h.QueryRow(h.ctx, "SELECT sum(n) FROM "+h.Table("hot")).Scan(&sum); err != nil || sum != n {
		t.Errorf("%d effects of %d messages: %v", sum, n, err)
	}
}

// Two consumers with batches of 100 over the same rows: of two transactions that wait for each
// other one gives up. Consumers that try the same batch again do so time after time; ours make
// smaller ones for a while. No attempt is spent.
func TestBatchesOverTheSameRowsAdapt(t *testing.T) {
	t.Parallel()
	const n, batch = hotMessages, 100
	b := setupBroker(t)
	rows := newHotRows(t, b.env)
	b.publish(t, numbered(n)...)
	var all []*running
	for range 2 {
		cfg := b.config(t)
		cfg.Batch, cfg.Workers, cfg.Prefetch = batch, 1, 2*batch
		all = append(all, b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
			return rows.update(ctx, tx, m.ID)
		}, cfg))
	}
	testenv.Eventually(t, 2*testLimit, "all applied", func() bool {
		return all[0].Stats().Applied+all[1].Stats().Applied == n
	})
	for _, c := range all {
		c.stop()
		if s := c.Stats(); s.Failures != 0 {
			t.Errorf("%+v", s)
		}
	}
	rows.want(t, n)
	b.wantReady(t, 0)

	naive := newHotRows(t, setup(t))
	const fewer = 2 * batch // nobody knows for how long these two would go on
	var consumers, halfway sync.WaitGroup
	halfway.Add(2)
	for i := range 2 {
		consumers.Go(func() {
			naive.sameBatchAgain(t, i*batch, batch, func() { halfway.Done(); halfway.Wait() })
		})
	}
	consumers.Wait()
	ours, theirs := float64(rows.updates.Load()-n)/n, float64(naive.inVain.Load())/fewer
	t.Logf("%.3f updates in vain for each message, %.3f when the same batch is tried again", ours, theirs)
	if ours >= theirs {
		t.Error("that is no better")
	}
}

// sameBatchAgain is the naive variant, that gives up after some conflicts. The first time it
// waits halfway for the other.
func (h *hotRows) sameBatchAgain(t *testing.T, from, batch int, halfway func()) {
	for range 3 {
		updates := int64(0)
		err := pgx.BeginFunc(h.ctx, h.Pool, func(tx pgx.Tx) error {
			for i := from; i < from+batch; i++ {
				if first, err := h.Record(h.ctx, tx, consumer, fmt.Sprint(i)); err != nil || !first {
					return fmt.Errorf("record: %v, %w", first, err)
				}
				if err := h.update(h.ctx, tx, fmt.Sprint(i)); err != nil {
					return err
				}
				updates++
				if i == from+batch/2-1 {
					halfway()
					halfway = func() {}
				}
			}
			return nil
		})
		if err == nil {
			return
		}
		h.inVain.Add(updates)
		if pgErr := (*pgconn.PgError)(nil); !errors.As(err, &pgErr) || pgErr.Code != "40P01" {
			t.Error(err)
			return
		}
	}
}
