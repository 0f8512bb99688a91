package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	heldSteps = 9 // before what counts
	heldStep  = 100_000
)

// held: messages come in steps while somebody's transaction keeps what the relay
// deletes. The steps that come after the first 900,000 messages are held against those
// of a clean run, in turn; a snapshot keeps the dead rows of its own database alone.
func held(ctx context.Context, b *bench) ([]Result, error) {
	clean, err := b.newHolding(ctx, "clean", pgx.ReadCommitted, "")
	if err != nil {
		return nil, err
	}
	defer clean.end(ctx)
	reader, err := b.newHolding(ctx, "reader", pgx.RepeatableRead, "SELECT count(*) FROM bench_held.outbox")
	if err != nil {
		return nil, err
	}
	defer reader.end(ctx)
	writer, err := b.newHolding(ctx, "writer", pgx.ReadCommitted, "CREATE TABLE bench_held.written ()")
	if err != nil {
		return nil, err
	}
	defer writer.end(ctx)
	naive, err := b.newHolding(ctx, "naive", pgx.RepeatableRead, "SELECT count(*) FROM bench_held.outbox")
	if err != nil {
		return nil, err
	}
	defer naive.end(ctx)
	var ofReader, ofWriter []Round
	for step := range heldSteps + b.rounds {
		limit, err := clean.step(ctx)
		if err != nil {
			return nil, err
		}
		read, err := reader.step(ctx)
		if err != nil {
			return nil, err
		}
		written, err := writer.step(ctx)
		if err != nil {
			return nil, err
		}
		b.say("held, step %d: clean %.0f/s, reader %.0f/s, writer %.0f/s", step+1, limit, read, written)
		if step >= heldSteps {
			ofReader = append(ofReader, Round{Value: read, Limit: limit, Ratio: read / limit})
			ofWriter = append(ofWriter, Round{Value: written, Limit: limit, Ratio: written / limit})
		}
	}
	rates, err := naive.naiveSteps(ctx)
	if err != nil {
		return nil, err
	}
	b.say("held, naive: %.0f/s in steps", rates)
	results := []Result{sideBySide("reader", "msg/s", 0.95, ofReader), sideBySide("writer", "msg/s", 0.90, ofWriter)}
	results[0].Peers = map[string]float64{"naive first step": rates[0], "naive last step": rates[len(rates)-1]}
	return results, nil
}

// holding is a place in a database of its own in which a transaction stays open.
type holding struct {
	*place
	admin     *pgxpool.Pool
	database  string
	key       string
	tx        pgx.Tx
	relay     *running
	published int64
}

// newHolding makes one; the transaction has run sql, if that is given.
func (b *bench) newHolding(ctx context.Context, name string, level pgx.TxIsoLevel, sql string) (*holding, error) {
	h := &holding{database: "bench_held_" + name}
	var err error
	if h.admin, err = pgxpool.New(ctx, b.databaseURL); err != nil {
		return nil, err
	}
	dbURL, err := url.Parse(b.databaseURL)
	if err != nil {
		return nil, err
	}
	dbURL.Path = "/" + h.database
	for _, statement := range []string{"DROP DATABASE IF EXISTS ", "CREATE DATABASE "} {
		if _, err := h.admin.Exec(ctx, statement+h.database); err != nil {
			return nil, err
		}
	}
	if h.place, err = newPlace(ctx, dbURL.String(), b.amqpURL, "held"); err != nil {
		return nil, err
	}
	if h.key, err = h.fresh(ctx, name); err != nil || sql == "" {
		return h, err
	}
	if h.tx, err = h.db.BeginTx(ctx, pgx.TxOptions{IsoLevel: level}); err != nil {
		return nil, err
	}
	_, err = h.tx.Exec(ctx, sql)
	return h, err
}

// step has a relay drain what was committed at once, and returns the rate. The queue is
// new each time: one that nobody consumes grows slower with its length.
func (h *holding) step(ctx context.Context) (rate float64, err error) {
	if h.relay == nil {
		if h.relay, err = h.place.relay(ctx); err != nil {
			return 0, err
		}
	}
	if err := errors.Join(h.queue(h.name()), h.fill(ctx, heldStep, 10_000, h.key)); err != nil {
		return 0, err
	}
	h.published += heldStep
	began := time.Now()
	err = h.drained(ctx, h.relay, h.published)
	return heldStep / time.Since(began).Seconds(), err
}

func (h *holding) name() string { return h.key[len(h.exchange)+1:] }

func (h *holding) end(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	if h.relay != nil {
		h.relay.end()
	}
	if h.tx != nil {
		h.tx.Rollback(ctx)
	}
	h.close(ctx)
	h.admin.Exec(ctx, "DROP DATABASE IF EXISTS "+h.database)
	h.admin.Close()
}

// naiveSteps returns the rates of the relay that everybody writes first, in smaller steps: it
// locks a page, publishes it, awaits the confirms, deletes it and commits.
func (h *holding) naiveSteps(ctx context.Context) ([]float64, error) {
	ch, err := h.conn.Channel()
	if err != nil {
		return nil, err
	}
	defer ch.Close()
	if err := ch.Confirm(false); err != nil {
		return nil, err
	}
	const steps, n = 10, heldStep / 10
	var rates []float64
	for range steps {
		if err := errors.Join(h.queue(h.name()), h.fill(ctx, n, 10_000, h.key)); err != nil {
			return nil, err
		}
		began := time.Now()
		for left := n; left > 0; {
			done, err := h.naivePage(ctx, ch)
			if err != nil || done == 0 {
				return nil, errors.Join(err, fmt.Errorf("naive relay: %d messages left", left))
			}
			left -= done
		}
		rates = append(rates, n/time.Since(began).Seconds())
	}
	return rates, nil
}

func (p *place) naivePage(ctx context.Context, ch *amqp.Channel) (n int, err error) {
	tx, err := p.db.Begin(ctx)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback(ctx)
	rows, err := tx.Query(ctx, "SELECT id, message_id::text, exchange, routing_key, payload FROM "+p.table("outbox")+
		" ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED")
	if err != nil {
		return 0, err
	}
	var ids []int64
	var confirms []*amqp.DeferredConfirmation
	var id int64
	var messageID, exchange, routingKey string
	var body []byte
	_, err = pgx.ForEachRow(rows, []any{&id, &messageID, &exchange, &routingKey, &body}, func() error {
		confirm, err := ch.PublishWithDeferredConfirm(exchange, routingKey, true, false,
			amqp.Publishing{MessageId: messageID, DeliveryMode: amqp.Persistent, Body: body})
		ids, confirms = append(ids, id), append(confirms, confirm)
		return err
	})
	if err != nil {
		return 0, err
	}
	for _, confirm := range confirms {
		if !confirm.Wait() {
			return 0, errors.New("naive relay: not confirmed")
		}
	}
	if _, err := tx.Exec(ctx, "DELETE FROM "+p.table("outbox")+" WHERE id = ANY($1)", ids); err != nil {
		return 0, err
	}
	return len(ids), tx.Commit(ctx)
}
